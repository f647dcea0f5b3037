// The guest: memory, a queue pair, and what its driver makes available first.
#include "netgen.h"

#include <linux/virtio_config.h>
#include <linux/virtio_net.h>

#define RING_ADDRESS 0x1000u
#define TABLE_BYTES 512u // an indirect table of a slot
#define MAX_PARTS (TABLE_BYTES / sizeof(struct vring_desc))

static uint64_t wanted(const struct options *options)
{
	uint64_t features = (uint64_t)options->event_index << VIRTIO_RING_F_EVENT_IDX |
			    (uint64_t)options->indirect << VIRTIO_RING_F_INDIRECT_DESC |
			    (uint64_t)options->mergeable << VIRTIO_NET_F_MRG_RXBUF;

	if (options->gso)
		features |= 1ull << VIRTIO_NET_F_CSUM | 1ull << VIRTIO_NET_F_HOST_TSO4 |
			    1ull << VIRTIO_NET_F_GUEST_CSUM | 1ull << VIRTIO_NET_F_GUEST_TSO4;
	return features;
}

static uint32_t slot_stride(const struct guest *guest)
{
	return (guest->room + SEGMENT - 1) / SEGMENT * SEGMENT;
}

uint8_t *guest_slot(const struct guest *guest, unsigned int slot)
{
	return guest->memory.base + guest->buffers + (uint64_t)slot * slot_stride(guest);
}

static void offer(struct guest *guest, unsigned int slot, uint16_t flags)
{
	uint64_t at = guest->buffers + (uint64_t)slot * slot_stride(guest);
	struct vring_desc parts[MAX_PARTS];
	unsigned int count = 0;

	for (uint32_t done = 0; done < guest->room; done += SEGMENT, count++) {
		uint32_t left = guest->room - done;

		parts[count] = (struct vring_desc){at + done, left < SEGMENT ? left : SEGMENT, flags,
						   0};
	}
	ring_add(guest->ring, &guest->memory, slot, guest->tables + (uint64_t)slot * TABLE_BYTES,
		 parts, count);
}

// Chains of one descriptor need no table.
static void size_up(struct guest *guest, const struct options *options)
{
	bool receive = options->direction == RECEIVE;

	guest->room = receive && options->mergeable ? options->buffer : HEADER + options->length;
	guest->ring->per_chain = (guest->room + SEGMENT - 1) / SEGMENT;
	guest->ring->indirect &= guest->ring->per_chain > 1;
	if (guest->ring->per_chain > MAX_PARTS)
		fail("--length %u: too many segments", options->length);
	guest->slots = options->queue_size / (guest->ring->indirect ? 1 : guest->ring->per_chain);
	if (options->window && options->window < guest->slots && !receive)
		guest->slots = options->window;
	if (!guest->slots)
		fail("--queue-size %u: a frame doesn't fit", options->queue_size);
}

void guest_open(struct guest *guest, const struct options *options)
{
	uint64_t rings = 2 * ring_bytes(options->queue_size);

	vhost_connect(&guest->vhost, options->socket, wanted(options));
	if (options->direction == RECEIVE && options->mergeable &&
	    !(guest->vhost.features >> VIRTIO_NET_F_MRG_RXBUF & 1))
		fail("the back end has no mergeable buffers: --no-mergeable");
	guest->ring = &guest->rings[options->direction == RECEIVE ? 0 : 1];
	for (unsigned int i = 0; i < 2; i++) {
		guest->rings[i].event_index = guest->vhost.features >> VIRTIO_RING_F_EVENT_IDX & 1;
		guest->rings[i].indirect = guest->vhost.features >> VIRTIO_RING_F_INDIRECT_DESC & 1;
	}
	size_up(guest, options);
	guest->tables = RING_ADDRESS + rings;
	guest->buffers = guest->tables + (guest->slots * TABLE_BYTES + 0xfff) / 0x1000 * 0x1000;
	make_memory(&guest->memory, guest->buffers + (uint64_t)guest->slots * slot_stride(guest));
	vhost_set_memory(&guest->vhost, &guest->memory);
	for (unsigned int i = 0; i < 2; i++)
		ring_init(&guest->rings[i], &guest->memory,
			  RING_ADDRESS + i * ring_bytes(options->queue_size), options->queue_size);
	for (unsigned int i = 0; i < guest->slots; i++)
		offer(guest, i, options->direction == RECEIVE ? VRING_DESC_F_WRITE : 0);
}

void guest_start(struct guest *guest)
{
	for (unsigned int i = 0; i < 2; i++)
		vhost_start_ring(&guest->vhost, &guest->memory, &guest->rings[i], i);
}

void guest_stop(struct guest *guest)
{
	for (unsigned int i = 0; i < 2; i++)
		vhost_stop_ring(&guest->vhost, i);
}
