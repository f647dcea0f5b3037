// From the tap to the guest. The guest's buffers are filled by the read itself; only the end
// of a frame that is longer than expected goes through the bounce buffer. Chains that were
// taken and got no frame are held for the next one.
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include <linux/virtio_net.h>

#include "net/internal.h"

#define NUM_BUFFERS_OFFSET 10 // in struct virtio_net_hdr_v1
#define FILTER_BYTES 18

static bool is_mergeable(const struct sv_net_queue *queue)
{
	return queue->features & (1ull << VIRTIO_NET_F_MRG_RXBUF);
}

// Copy `len` bytes at `offset` of these buffers, from or to them; what doesn't fit is left out.
static size_t copy(const struct iovec *iov, unsigned int count, size_t offset, void *data,
		   size_t len, bool to)
{
	size_t done = 0;

	for (unsigned int i = 0; i < count && done < len; i++) {
		size_t room = iov[i].iov_len;
		size_t piece;

		if (offset >= room) {
			offset -= room;
			continue;
		}
		piece = room - offset < len - done ? room - offset : len - done;
		if (to)
			memcpy((uint8_t *)iov[i].iov_base + offset, (uint8_t *)data + done, piece);
		else
			memcpy((uint8_t *)data + done, (uint8_t *)iov[i].iov_base + offset, piece);
		done += piece;
		offset = 0;
	}
	return done;
}

// Take one more chain. False: there is none, no room for it, or the queue is broken.
static bool hold(struct sv_net_queue *queue)
{
	struct sv_chain *chain = &queue->chain;
	struct sv_net_held *held;

	if (queue->held_count == SV_NET_IOVS || sv_virtq_pop(&queue->vq, chain) <= 0)
		return false;
	if (chain->out_count || chain->in_bytes < SV_NET_HEADER || chain->in_count > SV_NET_IOVS) {
		sv_virtq_break(&queue->vq, "a receive buffer that can't hold a frame");
		return false;
	}
	if (queue->held_iovs + chain->in_count > SV_NET_IOVS) {
		sv_virtq_unpop(&queue->vq, chain->head);
		return false;
	}
	held = &queue->held[queue->held_count++];
	held->head = chain->head;
	held->iov_count = chain->in_count;
	held->bytes = chain->in_bytes;
	memcpy(&queue->iov[queue->held_iovs], chain->iov, chain->in_count * sizeof(struct iovec));
	queue->held_iovs += chain->in_count;
	queue->held_bytes += held->bytes;
	return true;
}

static void drop_held(struct sv_net_queue *queue, unsigned int count)
{
	unsigned int iovs = 0;

	for (unsigned int i = 0; i < count; i++) {
		iovs += queue->held[i].iov_count;
		queue->held_bytes -= queue->held[i].bytes;
	}
	queue->held_count -= count;
	queue->held_iovs -= iovs;
	memmove(queue->held, queue->held + count, queue->held_count * sizeof(queue->held[0]));
	memmove(queue->iov, queue->iov + iovs, queue->held_iovs * sizeof(queue->iov[0]));
}

void sv_net_release_held(struct sv_net_queue *queue)
{
	while (queue->held_count)
		sv_virtq_unpop(&queue->vq, queue->held[--queue->held_count].head);
	queue->held_iovs = 0;
	queue->held_bytes = 0;
}

// Chains for what is expected (one, if a frame can't go on in a second one).
static bool hold_expected(struct sv_net_queue *queue)
{
	if (!is_mergeable(queue)) {
		if (!queue->held_count)
			hold(queue);
		return queue->held_count;
	}
	while (queue->held_bytes < queue->expected && hold(queue))
		;
	return queue->held_count;
}

static bool is_wanted(struct sv_net_queue *queue, size_t len)
{
	uint8_t start[FILTER_BYTES];
	uint64_t version = __atomic_load_n(&queue->net->filter_version, __ATOMIC_ACQUIRE);

	if (version != queue->filter_version) {
		pthread_mutex_lock(&queue->net->lock);
		queue->filter = queue->net->settings.filter;
		queue->filter_version = queue->net->filter_version;
		pthread_mutex_unlock(&queue->net->lock);
	}
	if (queue->filter.promiscuous && !(queue->features & (1ull << VIRTIO_NET_F_CTRL_VLAN)))
		return true;
	len -= SV_NET_HEADER;
	if (len > sizeof(start))
		len = sizeof(start);
	len = copy(queue->iov, queue->held_iovs + 1, SV_NET_HEADER, start, len, false);
	return sv_net_filter_wants(&queue->filter, queue->features, start, len);
}

// Room for a frame of `len` bytes whose first `direct` bytes are in place: more chains get the
// rest out of the bounce buffer. False: the guest has not enough buffers.
static bool spread(struct sv_net_queue *queue, size_t len, size_t direct)
{
	unsigned int iovs = queue->held_iovs;

	if (len <= direct)
		return true;
	if (!is_mergeable(queue))
		return false;
	while (queue->held_bytes < len) {
		if (!hold(queue))
			return false;
	}
	copy(queue->iov + iovs, queue->held_iovs - iovs, 0, queue->bounce, len - direct, true);
	return true;
}

// Give the first chains back, filled with a frame of `len` bytes.
static void deliver(struct sv_net_queue *queue, size_t len)
{
	size_t left = len;
	uint16_t count = 0;

	for (; left; count++)
		left -= left < queue->held[count].bytes ? left : (size_t)queue->held[count].bytes;
	copy(queue->iov, queue->held_iovs, NUM_BUFFERS_OFFSET, &count, sizeof(count), true);
	// The driver must find all chains of a frame or none.
	if ((uint16_t)(queue->vq.used_idx - queue->vq.used_published) + count > queue->vq.size)
		sv_virtq_publish(&queue->vq);
	for (unsigned int i = 0; i < count; i++) {
		size_t part = len < queue->held[i].bytes ? len : (size_t)queue->held[i].bytes;

		sv_virtq_push(&queue->vq, queue->held[i].head, (uint32_t)part);
		len -= part;
	}
	drop_held(queue, count);
	queue->call_due = true;
}

// One frame. True: there was one.
static bool receive_one(struct sv_net_queue *queue)
{
	unsigned int iovs = queue->held_iovs;
	size_t direct = queue->held_bytes;
	ssize_t len;

	if (queue->tap < 0) {
		queue->tap_empty = true; // for good
		return false;
	}
	queue->iov[iovs] = (struct iovec){queue->bounce, SV_NET_FRAME_MAX};
	do
		len = readv(queue->tap, queue->iov, (int)iovs + 1);
	while (len < 0 && errno == EINTR);
	if (len <= 0) {
		// EBADFD: the interface is gone; nothing will come any more, nobody is to blame.
		queue->tap_empty = true;
		return false;
	}
	if (len <= SV_NET_HEADER || __atomic_load_n(&queue->net->link_down, __ATOMIC_RELAXED) ||
	    !is_wanted(queue, (size_t)len)) {
		queue->counters->dropped++;
		return true;
	}
	// Half way to what came, at once to what is more: streams have frames of one size.
	if ((size_t)len > queue->expected)
		queue->expected = (uint32_t)len;
	else
		queue->expected -= (queue->expected - (uint32_t)len) / 16;
	sv_bucket_take(&queue->net->buckets[0], (uint64_t)len - SV_NET_HEADER);
	if (!spread(queue, (size_t)len, direct)) {
		queue->counters->dropped++;
		return true;
	}
	deliver(queue, (size_t)len);
	queue->counters->packets++;
	queue->counters->bytes += (uint64_t)len - SV_NET_HEADER;
	return true;
}

bool sv_net_receive(struct sv_net_queue *queue)
{
	queue->tap_empty = false;
	for (unsigned int i = 0; i < SV_NET_BATCH; i++) {
		queue->wait_until = sv_bucket_wait(&queue->net->buckets[0]);
		if (queue->wait_until || !hold_expected(queue) || !receive_one(queue))
			return false;
	}
	return true;
}
