// A device over virtio-mmio (version 2) with split rings: how every driver finds and starts one.
#pragma once
#include "guest.h"

#define MAX_SIZE 256 // of a ring
#define TIMEOUT (10000 * NSEC_PER_MS)

#define REG_MAGIC 0x000
#define REG_VERSION 0x004
#define REG_DEVICE 0x008
#define REG_FEATURES 0x010
#define REG_FEATURES_SELECT 0x014
#define REG_DRIVER 0x020
#define REG_DRIVER_SELECT 0x024
#define REG_QUEUE 0x030
#define REG_QUEUE_MAX 0x034
#define REG_QUEUE_SIZE 0x038
#define REG_QUEUE_READY 0x044
#define REG_NOTIFY 0x050
#define REG_INTERRUPT 0x060
#define REG_ACK 0x064
#define REG_STATUS 0x070
#define REG_DESC 0x080
#define REG_AVAIL 0x090
#define REG_USED 0x0a0
#define REG_CONFIG 0x100

#define STATUS_DRIVER_OK 4
#define STATUS_FEATURES_OK 8
#define STATUS_NEEDS_RESET 64

#define F_INDIRECT (1ull << 28)
#define F_EVENT_INDEX (1ull << 29)
#define F_VERSION_1 (1ull << 32)

#define D_NEXT 1
#define D_WRITE 2
#define D_INDIRECT 4

#define S_NONE 0xaa // a status byte that the device has not written

struct desc {
	u64 address;
	u32 length;
	u16 flags, next;
};
struct avail {
	u16 flags, index, ring[MAX_SIZE + 1]; // + used_event
};
struct used {
	u16 flags, index;
	struct {
		u32 id, length;
	} ring[MAX_SIZE + 1]; // + avail_event
};

struct virtio {
	u64 base, features;
	u32 gsi;
	bool ready;
	u64 config_changes;
	void (*interrupted)(void); // the driver's; NULL: it has nothing to do
};

static inline u32 virtio_get(struct virtio *device, u32 reg) { return read32(device->base + reg); }
static inline void virtio_put(struct virtio *device, u32 reg, u32 value)
{
	write32(device->base + reg, value);
}

// The next device of this kind on the command line, from *text on; false: there is none.
bool virtio_find(struct virtio *device, const char **text, u32 id);
void virtio_reset(struct virtio *device);
// Reset, then negotiate what is both offered and in `known`; rings come next, then virtio_go.
bool virtio_begin(struct virtio *device, u64 known);
// Clear a ring and hand it over; its size, at most `size`, or 0: the device refuses.
u32 virtio_ring(struct virtio *device, u32 number, u32 size, struct desc *desc,
		struct avail *avail, struct used *used);
bool virtio_go(struct virtio *device);
// Publish the index; notify queue `number` if the device wants to hear of what came since `before`.
void virtio_kick(struct virtio *device, u32 number, struct avail *avail, struct used *used,
		 u32 size, u16 published, u16 before);
