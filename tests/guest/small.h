// Devices with small queues over virtio-mmio: one buffer a chain, one slot a descriptor.
#pragma once
#include "mmio.h"

#define SMALL_SIZE 16

struct small_ring {
	struct desc desc[SMALL_SIZE];
	struct avail avail __attribute__((aligned(64)));
	struct used used __attribute__((aligned(64)));
	u16 last_used, published;
	u32 number; // of the queue
} __attribute__((aligned(4096)));

// The first device with this id on the command line, reset and with `known` negotiated.
bool small_begin(struct virtio *device, u32 id, u64 known);
bool small_ring_init(struct virtio *device, struct small_ring *ring, u32 number);
void small_offer(struct virtio *device, struct small_ring *ring, u32 slot, void *buffer,
		 u32 length, bool writable);
// The slot of the next used buffer and what was written to it; -1: none.
int small_used(struct small_ring *ring, u32 *length);
// The same within some seconds.
int small_wait(struct virtio *device, struct small_ring *ring, u32 *length);
