// virtio-blk over virtio-mmio (version 2), split rings, several queues, many requests in flight.
#pragma once
#include "guest.h"

#define MAX_DISKS 8
#define MAX_QUEUES 4
#define MAX_SIZE 256
#define SECTOR 512
#define DATA_SIZE (8u << 20)
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

#define F_FLUSH (1ull << 9)
#define F_MQ (1ull << 12)
#define F_DISCARD (1ull << 13)
#define F_WRITE_ZEROES (1ull << 14)
#define F_INDIRECT (1ull << 28)
#define F_EVENT_INDEX (1ull << 29)
#define F_VERSION_1 (1ull << 32)
// SIZE_MAX, SEG_MAX, RO, BLK_SIZE, FLUSH, TOPOLOGY, MQ, DISCARD, WRITE_ZEROES, rings
#define F_KNOWN (2 | 4 | 0x20 | 0x40 | F_FLUSH | 0x400 | F_MQ | F_DISCARD | F_WRITE_ZEROES | \
		 F_INDIRECT | F_EVENT_INDEX | F_VERSION_1)

#define T_IN 0
#define T_OUT 1
#define T_FLUSH 4
#define T_GET_ID 8
#define T_DISCARD 11
#define T_WRITE_ZEROES 13
#define S_NONE 0xaa // not written by the device

#define D_NEXT 1
#define D_WRITE 2
#define D_INDIRECT 4

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
struct header {
	u32 type, reserved;
	u64 sector;
};
struct queue {
	struct desc desc[MAX_SIZE];
	struct avail avail __attribute__((aligned(64)));
	struct used used __attribute__((aligned(64)));
	struct desc indirect[MAX_SIZE][4];
	struct header header[MAX_SIZE];
	u8 status[MAX_SIZE];
	bool busy[MAX_SIZE]; // by request slot
	u32 want[MAX_SIZE];  // used length that a right device reports
	u16 last_used, published;
	u32 size, slots; // requests that fit
} __attribute__((aligned(4096)));
struct disk {
	u64 base, features, capacity;
	u32 gsi, queues;
	bool ready;
	u64 config_changes;
	struct queue *queue;
};

extern struct disk disks[MAX_DISKS];
extern u32 disk_count;
extern u8 data[DATA_SIZE];

bool disk_init(struct disk *disk, u64 mask, u32 size);
void disk_reset(struct disk *disk);
u32 queue_add(struct disk *disk, u32 number, u32 slot, struct header header, u8 *buffer, u32 length);
void queue_kick(struct disk *disk, u32 number, u16 before);
// Takes finished requests off the ring; the number, or -1 if the device wrote nonsense.
int queue_collect(struct disk *disk, u32 number, u8 *worst);
// One request, waited for; its status, S_NONE if it never came back.
u8 disk_request(struct disk *disk, u32 type, u64 sector, u8 *buffer, u32 length);
// The command blk.overlap (blk_overlap.c).
void blk_overlap(struct disk *disk, u64 sector, u64 lanes, u64 rounds, u64 salt);
