// The driver's side of a split ring (virtio 1.2, 2.7), with indirect tables and event index.
#include "frontend.h"

#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

static uint64_t align(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

static uint64_t used_offset(unsigned int size)
{
	return align(size * sizeof(struct vring_desc) + 2 * (3 + size), 64);
}

uint64_t ring_bytes(unsigned int size)
{
	return align(used_offset(size) + 4 + 2 + size * sizeof(struct vring_used_elem), 4096);
}

void ring_init(struct ring *ring, struct guest_memory *memory, uint64_t address, unsigned int size)
{
	struct epoll_event call = {.events = EPOLLIN | EPOLLET};

	ring->size = size;
	ring->desc_addr = address;
	ring->avail_addr = address + size * sizeof(struct vring_desc);
	ring->used_addr = address + used_offset(size);
	ring->desc = (void *)(memory->base + ring->desc_addr);
	ring->avail = (void *)(memory->base + ring->avail_addr);
	ring->used = (void *)(memory->base + ring->used_addr);
	ring->kick_fd = eventfd(0, EFD_CLOEXEC);
	ring->call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	ring->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (ring->kick_fd < 0 || ring->call_fd < 0 || ring->epoll_fd < 0 ||
	    epoll_ctl(ring->epoll_fd, EPOLL_CTL_ADD, ring->call_fd, &call) < 0)
		fail("no event descriptors");
}

static void link_chain(struct vring_desc *to, unsigned int first, const struct vring_desc *parts,
		       unsigned int count)
{
	for (unsigned int i = 0; i < count; i++) {
		to[i] = parts[i];
		if (i + 1 < count) {
			to[i].flags |= VRING_DESC_F_NEXT;
			to[i].next = (uint16_t)(first + i + 1);
		}
	}
}

void ring_add(struct ring *ring, struct guest_memory *memory, unsigned int slot, uint64_t table,
	      const struct vring_desc *parts, unsigned int count)
{
	unsigned int head = ring->indirect ? slot : slot * ring->per_chain;

	if (ring->indirect) {
		link_chain((void *)(memory->base + table), 0, parts, count);
		ring->desc[head] = (struct vring_desc){table, count * sizeof(struct vring_desc),
						       VRING_DESC_F_INDIRECT, 0};
	} else {
		link_chain(ring->desc + head, head, parts, count);
	}
	ring_add_again(ring, slot);
}

void ring_add_again(struct ring *ring, unsigned int slot)
{
	unsigned int head = ring->indirect ? slot : slot * ring->per_chain;

	ring->avail->ring[ring->avail_next % ring->size] = (uint16_t)head;
	ring->avail_next++;
	// The entry before the index that publishes it.
	__atomic_store_n(&ring->avail->idx, ring->avail_next, __ATOMIC_RELEASE);
}

void ring_kick(struct ring *ring)
{
	uint16_t old = ring->avail_seen, event;

	if (ring->avail_next == old)
		return;
	ring->avail_seen = ring->avail_next;
	// The index before the look at whether somebody sleeps; the back end does the reverse.
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (ring->event_index) {
		event = __atomic_load_n((uint16_t *)&ring->used->ring[ring->size], __ATOMIC_RELAXED);
		if (!vring_need_event(event, ring->avail_next, old))
			return;
	} else if (__atomic_load_n(&ring->used->flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY) {
		return;
	}
	ring->kicks++;
	eventfd_write(ring->kick_fd, 1);
}

int ring_take(struct ring *ring, uint32_t *written)
{
	const struct vring_used_elem *elem = &ring->used->ring[ring->used_next % ring->size];
	uint32_t head;

	if (__atomic_load_n(&ring->used->idx, __ATOMIC_ACQUIRE) == ring->used_next)
		return -1;
	head = elem->id;
	if (written)
		*written = elem->len;
	ring->used_next++;
	if (head >= ring->size)
		fail("the back end returned descriptor %u", head);
	return (int)(ring->indirect ? head : head / ring->per_chain);
}

bool ring_arm(struct ring *ring, uint16_t ahead)
{
	if (ring->event_index)
		__atomic_store_n(&ring->avail->ring[ring->size],
				 (uint16_t)(ring->used_next + ahead), __ATOMIC_RELAXED);
	else
		ahead = 0;
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return (uint16_t)(__atomic_load_n(&ring->used->idx, __ATOMIC_ACQUIRE) - ring->used_next) >
	       ahead;
}

bool ring_wait(struct ring *ring, int limit_ms)
{
	struct epoll_event event;

	// Edge-triggered, so that there is nothing to read: what the driver needs to come back is
	// time for which a back end that looks for requests is busy.
	if (epoll_wait(ring->epoll_fd, &event, 1, limit_ms) <= 0)
		return false;
	ring->calls++;
	return true;
}
