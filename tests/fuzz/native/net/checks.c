#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <string.h>

#include "world.h"

#define ANSWER 0xAA // no answer of a control queue
#define MAX_PIECES 48 // of a frame whose content is compared

void epoch_begin(void)
{
	unsigned int index = index_of(world.current);

	guest_epoch_begin();
	guest_allow_ring(&world.rings[index]);
	ledger_allow(index);
}

void end_frame(unsigned int index)
{
	struct frame *frame = &world.frames[index];
	const struct sv_virtq *vq = &world.net->queues[index].vq;

	if (!frame->given)
		return; // dropped, or it waits for buffers
	CHECK(frame->given == frame->length);
	CHECK(!frame->promised || frame->buffers == frame->promised);
	CHECK(frame->buffers == 1 ||
	      world.net->queues[index].features & 1ull << VIRTIO_NET_F_MRG_RXBUF);
	CHECK((uint16_t)(vq->used_idx - frame->begin) == frame->buffers);
	*frame = (struct frame){0};
}

// How many chains the header in the first one tells of, unless what is told may be gone already.
static unsigned int promised(unsigned int index, const struct ledger_chain *chain)
{
	const struct guest_ring *ring = &world.rings[index];
	const uint8_t *used = guest_at(ring->used, 6 + 8 * (uint64_t)ring->size);
	unsigned int value = 0, at = 10; // of struct virtio_net_hdr_v1

	for (unsigned int i = 0; i < chain->in_count && at < 12; i++) {
		const uint8_t *host = chain->iov[i].iov_base;
		size_t len = chain->iov[i].iov_len;

		if (!used || (host < used + 6 + 8 * ring->size && used < host + len))
			return 0;
		for (unsigned int skip = 0; at < 12 && at - 10 < 2 && skip < len; skip++) {
			unsigned int offset = at;

			for (unsigned int j = 0; j < i; j++)
				offset -= (unsigned int)chain->iov[j].iov_len;
			if (offset >= len)
				break;
			value |= (unsigned int)host[offset] << 8 * (at - 10);
			at++;
		}
	}
	return value;
}

// The pieces of these chains, unless there are many or one lies upon another one or on the ring:
// then what is in them depends on the order of writing.
static unsigned int list_pieces(unsigned int index, unsigned int chains, struct iovec *list)
{
	const struct ledger *ledger = &ledgers[index];
	const struct guest_ring *ring = &world.rings[index];
	uint8_t *used = guest_at(ring->used, 6 + 8 * (uint64_t)ring->size);
	unsigned int count = 1;

	list[0] = (struct iovec){used, 6 + 8 * (size_t)ring->size};
	for (unsigned int i = 0; i < chains && i < ledger->taken; i++) {
		const struct ledger_chain *chain = &ledger->chains[ledger->order[i]];

		for (unsigned int j = 0; j < chain->in_count; j++) {
			if (count == MAX_PIECES)
				return 0;
			list[count++] = chain->iov[chain->out_count + j];
		}
	}
	for (unsigned int i = 0; i < count; i++)
		for (unsigned int j = 0; j < i; j++) {
			const uint8_t *a = list[i].iov_base, *b = list[j].iov_base;

			if (a < b + list[j].iov_len && b < a + list[i].iov_len)
				return 0;
		}
	return count;
}

// The frame that is about to be given is the one that came over the tap.
static void check_content(unsigned int index)
{
	const struct frame *frame = &world.frames[index];
	struct iovec list[MAX_PIECES];
	unsigned int count;
	uint64_t at = 0;

	if (!frame->data || !frame->promised)
		return;
	count = list_pieces(index, frame->promised, list);
	for (unsigned int i = 1; i < count && at < frame->length; i++)
		for (size_t j = 0; j < list[i].iov_len && at < frame->length; j++, at++)
			CHECK(((uint8_t *)list[i].iov_base)[j] == frame->data[at] ||
			      at == 10 || at == 11); // num_buffers
	CHECK(!count || at == frame->length);
}

void on_push(unsigned int index, uint16_t head, uint32_t written)
{
	struct ledger_chain *chain = &ledgers[index].chains[head];
	struct frame *frame = &world.frames[index];
	uint8_t answer;

	switch (kind_of(index)) {
	case SV_NET_RECEIVE:
		if (!frame->given) {
			frame->begin = ledgers[index].vq->used_idx;
			frame->promised = threads() ? 0 : promised(index, chain);
			check_content(index);
		}
		CHECK(written);
		CHECK(ledgers[index].vq->used_published == frame->begin ||
		      (int16_t)(ledgers[index].vq->used_published - frame->begin) < 0);
		frame->given += written;
		frame->buffers++;
		break;
	case SV_NET_TRANSMIT:
		CHECK(!written);
		break;
	case SV_NET_CONTROL:
		CHECK(written == 1);
		if (threads())
			break;
		answer = *(uint8_t *)chain->iov[chain->out_count].iov_base;
		CHECK(answer == VIRTIO_NET_ERR || (answer == VIRTIO_NET_OK && !world.refusable));
	}
}

// Whether the command has a number that it can't have.
static bool is_refusable(const struct sv_chain *chain)
{
	uint8_t bytes[4] = {0};
	unsigned int number;

	for (unsigned int i = 0, at = 0; i < chain->out_count && at < 4; i++)
		for (size_t j = 0; j < chain->iov[i].iov_len && at < 4; j++)
			bytes[at++] = ((uint8_t *)chain->iov[i].iov_base)[j];
	number = bytes[2] | (unsigned int)bytes[3] << 8;
	if (chain->out_bytes < 3 && bytes[0] != VIRTIO_NET_CTRL_ANNOUNCE)
		return true;
	switch (bytes[0]) {
	case VIRTIO_NET_CTRL_RX: return bytes[1] > 5 || bytes[2] > 1;
	case VIRTIO_NET_CTRL_MAC: return bytes[1] > 1 || (bytes[1] && bytes[2] & 1);
	case VIRTIO_NET_CTRL_VLAN: return bytes[1] > 1 || number > 4095;
	case VIRTIO_NET_CTRL_ANNOUNCE: return bytes[1] != VIRTIO_NET_CTRL_ANNOUNCE_ACK;
	case VIRTIO_NET_CTRL_MQ: return bytes[1] || !number || number > world.pairs;
	case VIRTIO_NET_CTRL_GUEST_OFFLOADS: return bytes[1];
	default: return true;
	}
}

void on_pop(unsigned int index, struct sv_chain *chain)
{
	// Calls of native/virtq and of the tap: chains taken and given back, frames read.
	static const unsigned long longest[] = {
		[SV_NET_RECEIVE] = 3 * (SV_NET_BATCH + SV_NET_IOVS),
		[SV_NET_TRANSMIT] = 2 * SV_NET_BATCH,
		[SV_NET_CONTROL] = 2,
	};

	if (threads())
		return;
	if (kind_of(index) == SV_NET_CONTROL && chain->in_count) {
		*(uint8_t *)chain->iov[chain->out_count].iov_base = ANSWER;
		world.refusable = is_refusable(chain);
	}
	// No batch is longer than this, whatever the driver does.
	if (!world.current->stop && ledger_calls > world.limit) {
		world.current->stop = true;
		world.stopped = ledger_calls;
	}
	if (world.stopped)
		CHECK(ledger_calls - world.stopped <= longest[kind_of(index)]);
}

void check_counters(void)
{
	for (unsigned int i = 0; i < world.count; i++) {
		const struct sv_net_counters *counters = &world.counters[i];
		uint64_t frames = counters->packets + counters->dropped + counters->errors;

		if (kind_of(i) == SV_NET_RECEIVE)
			CHECK(frames == world.received[i]);
		else if (kind_of(i) == SV_NET_TRANSMIT)
			CHECK(frames == ledgers[i].all_pushes);
		else
			CHECK(counters->commands + counters->errors == ledgers[i].all_pushes);
	}
}

void check_tap(void)
{
	const struct sv_net_filter *filter = &world.net->settings.filter;
	unsigned int attached = 0, offloads = 0;

	CHECK(filter->unicast_count <= SV_NET_MAC_ENTRIES);
	CHECK(filter->multicast_count <= SV_NET_MAC_ENTRIES);
	CHECK(world.net->settings.pairs && world.net->settings.pairs <= world.pairs);
	if (world.refused || world.flags & F_NO_TAP || world.gone[0])
		return;
	for (unsigned int i = 0; i < world.pairs; i++) {
		if (world.gone[i])
			return;
		attached += world.attached[i];
	}
	CHECK(attached == world.net->settings.pairs);
	if (world.net->settings.offloads & 1ull << VIRTIO_NET_F_GUEST_CSUM)
		offloads |= TUN_F_CSUM;
	CHECK((world.offloads & TUN_F_CSUM) == offloads);
	CHECK(!(world.net->settings.offloads & ~world.net->features) || !world.net->features ||
	      world.flags & F_HOSTILE_STATE);
}
