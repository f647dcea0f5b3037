#include "small.h"

bool small_begin(struct virtio *device, u32 id, u64 known)
{
	const char *text = command_line();

	if (!device->base && !virtio_find(device, &text, id))
		return false;
	return virtio_begin(device, known);
}

bool small_ring_init(struct virtio *device, struct small_ring *ring, u32 number)
{
	memset(ring, 0, sizeof(*ring));
	ring->number = number;
	return virtio_ring(device, number, SMALL_SIZE, ring->desc, &ring->avail, &ring->used) ==
	       SMALL_SIZE;
}

void small_offer(struct virtio *device, struct small_ring *ring, u32 slot, void *buffer,
		 u32 length, bool writable)
{
	ring->desc[slot] = (struct desc){ (u64)buffer, length, writable ? D_WRITE : 0, 0 };
	ring->avail.ring[ring->published++ % SMALL_SIZE] = (u16)slot;
	ring->avail.ring[SMALL_SIZE] = ring->last_used; // used_event: tell of the next one
	barrier();
	*(volatile u16 *)&ring->avail.index = ring->published;
	barrier();
	virtio_put(device, REG_NOTIFY, ring->number);
}

int small_used(struct small_ring *ring, u32 *length)
{
	u32 at = ring->last_used % SMALL_SIZE;

	if (*(volatile u16 *)&ring->used.index == ring->last_used)
		return -1;
	ring->last_used++;
	ring->avail.ring[SMALL_SIZE] = ring->last_used;
	barrier();
	*length = *(volatile u32 *)&ring->used.ring[at].length;
	return (int)(*(volatile u32 *)&ring->used.ring[at].id % SMALL_SIZE);
}

int small_wait(struct virtio *device, struct small_ring *ring, u32 *length)
{
	u64 deadline = clock_ns() + TIMEOUT;
	volatile u64 *seen = &interrupt_count[VECTOR_GSI + device->gsi];

	for (;;) {
		u64 old = *seen;
		int slot = small_used(ring, length);

		if (slot >= 0 || !wait_change(seen, old, deadline))
			return slot;
	}
}
