// From the tap to the guest. Where long frames are expected the guest's buffers are filled by the
// read itself, and only the end of one that is still longer goes through the bounce buffer; short
// ones go through it altogether. Chains that were taken and got no frame are held for the next
// one; a frame that finds too few of them waits for more, as all that come behind it do in the tap.
#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/virtio_net.h>

#include "net/internal.h"

#define NUM_BUFFERS_OFFSET 10 // in struct virtio_net_hdr_v1
#define FILTER_BYTES 18
// To copy so many bytes once more costs less than a vector, which must have a place for the end of
// any frame behind the guest's buffers.
#define SHORT_MAX 2048

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

enum hold { HELD, NO_CHAIN, NO_ROOM };

static struct iovec *held_iov(struct sv_net_queue *queue)
{
	return queue->iov + queue->iov_first;
}

// To the front again; seldom, as the arrays have twice the room.
static void compact(struct sv_net_queue *queue)
{
	memmove(queue->held, queue->held + queue->held_first,
		queue->held_count * sizeof(queue->held[0]));
	memmove(queue->iov, held_iov(queue), queue->held_iovs * sizeof(queue->iov[0]));
	queue->held_first = 0;
	queue->iov_first = 0;
}

// Take one more chain. NO_CHAIN: there is none, or the queue is broken.
static enum hold hold(struct sv_net_queue *queue)
{
	struct sv_chain *chain = &queue->chain;
	struct sv_net_held *held;

	if (queue->held_iovs == SV_NET_IOVS)
		return NO_ROOM;
	if (sv_virtq_pop(&queue->vq, chain) <= 0)
		return NO_CHAIN;
	if (chain->out_count || chain->in_bytes < SV_NET_HEADER || chain->in_count > SV_NET_IOVS) {
		sv_virtq_break(&queue->vq, "a receive buffer that can't hold a frame");
		return NO_CHAIN;
	}
	if (queue->held_iovs + chain->in_count > SV_NET_IOVS) {
		sv_virtq_unpop(&queue->vq, chain->head);
		return NO_ROOM;
	}
	if (queue->iov_first + queue->held_iovs + chain->in_count > 2 * SV_NET_IOVS)
		compact(queue);
	held = &queue->held[queue->held_first + queue->held_count++];
	held->head = chain->head;
	held->iov_count = chain->in_count;
	held->bytes = chain->in_bytes;
	for (unsigned int i = 0; i < chain->in_count; i++)
		held_iov(queue)[queue->held_iovs + i] = chain->iov[i];
	queue->held_iovs += chain->in_count;
	queue->held_bytes += held->bytes;
	return HELD;
}

void sv_net_release_held(struct sv_net_queue *queue)
{
	while (queue->held_count)
		sv_virtq_unpop(&queue->vq,
			       queue->held[queue->held_first + --queue->held_count].head);
	queue->held_first = queue->iov_first = queue->held_iovs = 0;
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
	while (queue->held_bytes < queue->expected && hold(queue) == HELD)
		;
	return queue->held_count;
}

// A frame of `len` bytes, header and all, in the first `count` pieces of the vector.
static bool is_wanted(struct sv_net_queue *queue, size_t len, unsigned int count)
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
	len = copy(queue->vector, count, SV_NET_HEADER, start, len, false);
	return sv_net_filter_wants(&queue->filter, queue->features, start, len);
}

// Buffers for what of the waiting frame is in the bounce buffer. NO_CHAIN: the driver may still
// make some available; NO_ROOM: they never hold it.
static enum hold spread(struct sv_net_queue *queue)
{
	uint64_t rest = queue->waiting - queue->direct;
	uint64_t offset = queue->direct;

	if (queue->waiting <= queue->direct)
		return HELD;
	if (!is_mergeable(queue) && queue->held_bytes < queue->waiting)
		return NO_ROOM;
	while (queue->held_bytes < queue->waiting) {
		enum hold held = hold(queue);

		// A driver all of whose descriptors are held has none to add.
		if (held == NO_CHAIN && queue->held_iovs >= queue->vq.size)
			return NO_ROOM;
		if (held != HELD)
			return held;
	}
	copy(held_iov(queue), queue->held_iovs, offset, queue->bounce, rest, true);
	return HELD;
}

static void set_buffer_count(struct sv_net_queue *queue, uint16_t count)
{
	struct iovec *iov = held_iov(queue);

	if (iov->iov_len >= SV_NET_HEADER)
		memcpy((uint8_t *)iov->iov_base + NUM_BUFFERS_OFFSET, &count, sizeof(count));
	else
		copy(iov, queue->held_iovs, NUM_BUFFERS_OFFSET, &count, sizeof(count), true);
}

// Give the first chains back, filled with a frame of `len` bytes.
static void deliver(struct sv_net_queue *queue, size_t len)
{
	struct sv_net_held *held = queue->held + queue->held_first;
	size_t left = len;
	uint16_t count = 0;

	for (; left; count++)
		left -= left < held[count].bytes ? left : (size_t)held[count].bytes;
	set_buffer_count(queue, count);
	// The driver must find all chains of a frame or none.
	if ((uint16_t)(queue->vq.used_idx - queue->vq.used_published) + count > queue->vq.size)
		sv_virtq_publish(&queue->vq);
	for (unsigned int i = 0; i < count; i++) {
		size_t part = len < held[i].bytes ? len : (size_t)held[i].bytes;

		sv_virtq_push(&queue->vq, held[i].head, (uint32_t)part);
		len -= part;
		queue->held_bytes -= held[i].bytes;
		queue->held_iovs -= held[i].iov_count;
		queue->iov_first += held[i].iov_count;
	}
	queue->held_first += count;
	queue->held_count -= count;
	if (!queue->held_count)
		queue->held_first = queue->iov_first = 0;
	queue->call_due = true;
}

// Give the waiting frame to the guest. False: it goes on waiting, for buffers.
static bool place(struct sv_net_queue *queue)
{
	enum hold held = spread(queue);

	if (held == NO_CHAIN)
		return false;
	if (held == HELD) {
		deliver(queue, queue->waiting);
		queue->counters->packets++;
		queue->counters->bytes += queue->waiting - SV_NET_HEADER;
	} else {
		queue->counters->dropped++;
	}
	queue->waiting = 0;
	return true;
}

// The next frame into vector[0, *count), of which `direct` bytes are guest's; its length.
// Not by read() and readv(): they are cancellation points, entering and leaving one costs 3 % of a
// small frame.
static ssize_t read_frame(struct sv_net_queue *queue, unsigned int *count)
{
	ssize_t len;

	*count = 0;
	queue->direct = 0;
	if (queue->expected > SHORT_MAX) {
		*count = sv_net_merge(held_iov(queue), queue->held_iovs, queue->vector);
		queue->direct = queue->held_bytes;
	}
	queue->vector[(*count)++] = (struct iovec){queue->bounce, SV_NET_FRAME_MAX};
	do {
		if (*count == 1)
			len = syscall(SYS_read, queue->tap, queue->bounce, SV_NET_FRAME_MAX);
		else
			len = syscall(SYS_readv, queue->tap, queue->vector, *count);
	} while (len < 0 && errno == EINTR);
	return len;
}

// Take one frame from the tap. False: there was none.
static bool take(struct sv_net_queue *queue)
{
	unsigned int count;
	ssize_t len;

	if (queue->tap < 0) {
		queue->tap_empty = true; // for good
		return false;
	}
	len = read_frame(queue, &count);
	if (len <= 0) {
		// EBADFD: the interface is gone; nothing will come any more, nobody is to blame.
		queue->tap_empty = true;
		return false;
	}
	if (len <= SV_NET_HEADER || __atomic_load_n(&queue->net->link_down, __ATOMIC_RELAXED) ||
	    !is_wanted(queue, (size_t)len, count)) {
		queue->counters->dropped++;
		return true;
	}
	// A sixteenth of the way to what came, at once to what is more: streams have frames of one
	// size.
	if ((size_t)len > queue->expected)
		queue->expected = (uint32_t)len;
	else
		queue->expected -= (queue->expected - (uint32_t)len) / 16;
	sv_bucket_take(&queue->net->buckets[0], (uint64_t)len - SV_NET_HEADER);
	queue->waiting = (uint32_t)len;
	return true;
}

bool sv_net_receive(struct sv_net_queue *queue)
{
	unsigned int frames = 0;

	queue->tap_empty = false;
	do {
		if (!queue->waiting) {
			queue->wait_until = sv_bucket_wait(&queue->net->buckets[0]);
			if (queue->wait_until || !hold_expected(queue) || !take(queue))
				return false;
		}
		if (queue->waiting && !place(queue))
			return false;
	} while (++frames < SV_NET_BATCH && !sv_net_is_batch(&queue->vq));
	return true;
}
