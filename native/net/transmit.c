// From the guest to the tap.
#include <errno.h>
#include <unistd.h>

#include "net/internal.h"

// Buffers to be written, which no driver has reason to add, are not found behind it any more.
static void merge(struct sv_chain *chain)
{
	if (chain->out_count > 1)
		chain->out_count = (uint16_t)sv_net_merge(chain->iov, chain->out_count, chain->iov);
}

// The kernel copies header and frame, and checks the header's offsets on its copy.
static ssize_t send_frame(int tap, const struct sv_chain *chain)
{
	ssize_t sent;

	do {
		// A vector is a tenth of the cost of a small frame.
		if (chain->out_count == 1)
			sent = write(tap, chain->iov[0].iov_base, chain->iov[0].iov_len);
		else
			sent = writev(tap, chain->iov, chain->out_count);
	} while (sent < 0 && errno == EINTR);
	return sent;
}

// True: the frame is dealt with; false: the tap takes no more now.
static bool send_chain(struct sv_net_queue *queue)
{
	struct sv_chain *chain = &queue->chain;
	ssize_t sent;

	if (chain->out_bytes < SV_NET_HEADER || chain->out_bytes > SV_NET_FRAME_MAX) {
		queue->counters->errors++;
		return true;
	}
	if (queue->tap < 0 || __atomic_load_n(&queue->net->link_down, __ATOMIC_RELAXED)) {
		queue->counters->dropped++;
		return true;
	}
	sent = send_frame(queue->tap, chain);
	if (sent >= 0) {
		queue->counters->packets++;
		queue->counters->bytes += (uint64_t)sent - SV_NET_HEADER;
		sv_bucket_take(&queue->net->buckets[1], (uint64_t)sent - SV_NET_HEADER);
		return true;
	}
	if (errno == EAGAIN)
		return false;
	// EINVAL: a header that lies, or a frame that is none; EIO: the interface is down, ENOBUFS.
	// A NIC drops what it can't send.
	if (errno == EINVAL)
		queue->counters->errors++;
	else
		queue->counters->dropped++;
	return true;
}

bool sv_net_transmit(struct sv_net_queue *queue)
{
	do {
		if (!queue->chain_waits) {
			queue->wait_until = sv_bucket_wait(&queue->net->buckets[1]);
			if (queue->wait_until)
				return false;
			if (sv_virtq_pop(&queue->vq, &queue->chain) <= 0)
				return false;
			sv_virtq_prefetch(&queue->vq);
			merge(&queue->chain);
		}
		queue->chain_waits = !send_chain(queue);
		if (queue->chain_waits)
			return false;
		sv_virtq_push(&queue->vq, queue->chain.head, 0);
		queue->call_due = true;
	} while (!sv_net_is_batch(&queue->vq));
	return true;
}
