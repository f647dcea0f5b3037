// virtio-blk over virtio-mmio (version 2), split rings, several queues, many requests in flight.
#pragma once
#include "mmio.h"

#define MAX_DISKS 8
#define MAX_QUEUES 4
#define SECTOR 512
#define DATA_SIZE (8u << 20)

#define F_FLUSH (1ull << 9)
#define F_MQ (1ull << 12)
#define F_DISCARD (1ull << 13)
#define F_WRITE_ZEROES (1ull << 14)
// SIZE_MAX, SEG_MAX, RO, BLK_SIZE, FLUSH, TOPOLOGY, MQ, DISCARD, WRITE_ZEROES, rings
#define F_KNOWN (2 | 4 | 0x20 | 0x40 | F_FLUSH | 0x400 | F_MQ | F_DISCARD | F_WRITE_ZEROES | \
		 F_INDIRECT | F_EVENT_INDEX | F_VERSION_1)

#define T_IN 0
#define T_OUT 1
#define T_FLUSH 4
#define T_GET_ID 8
#define T_DISCARD 11
#define T_WRITE_ZEROES 13

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
	struct virtio virtio;
	u64 capacity;
	u32 queues;
	struct queue *queue;
};

extern struct disk disks[MAX_DISKS];
extern u32 disk_count;
extern u8 data[DATA_SIZE];

bool disk_init(struct disk *disk, u64 mask, u32 size);
u32 queue_add(struct disk *disk, u32 number, u32 slot, struct header header, u8 *buffer, u32 length);
void queue_kick(struct disk *disk, u32 number, u16 before);
// Takes finished requests off the ring; the number, or -1 if the device wrote nonsense.
int queue_collect(struct disk *disk, u32 number, u8 *worst);
// One request, waited for; its status, S_NONE if it never came back.
u8 disk_request(struct disk *disk, u32 type, u64 sector, u8 *buffer, u32 length);
// The command blk.overlap (blk_overlap.c).
void blk_overlap(struct disk *disk, u64 sector, u64 lanes, u64 rounds, u64 salt);
