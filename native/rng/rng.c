#include "rng/rng.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "include/clock.h"
#include "limit/limit.h"

#define BATCH_CHAINS 64 // between two looks at everything else,
#define BATCH_BYTES (1 << 20) // or so many bytes
#define PAUSE_MIN_NS 1000000ull
#define PAUSE_MAX_NS 128000000ull
#define MS 1000000ull

struct rng {
	int source;
	uint64_t request_max;
	bool asked;     // poll was asked once since the source had something last
	uint64_t pause; // ns, before it is tried again
	struct sv_bucket bucket;
};

static struct sv_rng_counters *counters_of(struct sv_ring_device *device)
{
	return (struct sv_rng_counters *)device->queues[0].counters;
}

// Cut the buffers to `max` bytes; how many remain.
static int shorten(struct iovec *iov, unsigned int count, uint64_t max)
{
	for (unsigned int i = 0; i < count; i++) {
		if (iov[i].iov_len >= max) {
			iov[i].iov_len = max;
			return (int)i + 1;
		}
		max -= iov[i].iov_len;
	}
	return (int)count;
}

// The source gave nothing: take the request back and wait. There are sources that poll calls
// ready and that are not (/dev/hwrng has no poll operation): after a second time it is a pause
// that is waited for.
static enum sv_ring_next starve(struct sv_ring_device *device, int error)
{
	struct rng *rng = device->own;
	struct sv_ring_queue *queue = &device->queues[0];

	sv_virtq_unpop(&queue->vq, device->chain->head);
	counters_of(device)->starved++;
	if (error == EAGAIN && !rng->asked) {
		rng->asked = true;
		sv_ring_await(device, 0, rng->source, POLLIN);
		return SV_RING_WAITS;
	}
	if (error != EAGAIN)
		counters_of(device)->errors++;
	rng->pause = rng->pause ? 2 * rng->pause : PAUSE_MIN_NS;
	if (rng->pause > PAUSE_MAX_NS)
		rng->pause = PAUSE_MAX_NS;
	queue->wait_until = sv_now_ns() + rng->pause;
	return SV_RING_WAITS;
}

static enum sv_ring_next serve(struct sv_ring_device *device, unsigned int index)
{
	struct rng *rng = device->own;
	struct sv_ring_queue *queue = &device->queues[index];
	struct sv_chain *chain = device->chain;
	uint64_t done = 0;

	for (unsigned int i = 0; i < BATCH_CHAINS && done < BATCH_BYTES; i++) {
		ssize_t got;
		int count;

		if (sv_virtq_pop(&queue->vq, chain) <= 0)
			return SV_RING_EMPTY;
		if (chain->out_count) {
			sv_virtq_break(&queue->vq, "a request with buffers to be read");
			return SV_RING_EMPTY;
		}
		queue->wait_until = sv_bucket_wait(&rng->bucket);
		if (queue->wait_until) {
			sv_virtq_unpop(&queue->vq, chain->head);
			counters_of(device)->throttled++;
			return SV_RING_WAITS;
		}
		count = shorten(chain->iov, chain->in_count, rng->request_max);
		do
			got = readv(rng->source, chain->iov, count);
		while (got < 0 && errno == EINTR);
		if (got <= 0)
			return starve(device, got ? errno : 0);
		rng->asked = false;
		rng->pause = 0;
		sv_bucket_take(&rng->bucket, (uint64_t)got);
		counters_of(device)->bytes += (uint64_t)got;
		done += (uint64_t)got;
		sv_ring_push(device, index, chain->head, (uint32_t)got);
	}
	return SV_RING_MORE;
}

static void ready(struct sv_ring_device *device, unsigned int slot, short events)
{
	sv_ring_await(device, slot, -1, 0);
	sv_ring_due(device, 0);
}

static void stopping(struct sv_ring_device *device, unsigned int index)
{
	sv_ring_await(device, 0, -1, 0);
}

static void destroy(struct sv_ring_device *device)
{
	struct rng *rng = device->own;

	sv_bucket_deinit(&rng->bucket);
	free(rng);
}

static const struct sv_ring_kind kind = {
	.serve = serve,
	.ready = ready,
	.stopping = stopping,
	.destroy = destroy,
};

struct sv_ring_device *sv_rng_create(int source, uint64_t max_bytes, unsigned int period_ms,
				     unsigned int queue_size, struct sv_rng_counters *counters,
				     int *error)
{
	struct sv_rate rate = {0, max_bytes && period_ms ? max_bytes * 1000 / period_ms : 0};
	struct sv_ring_device *device;
	struct rng *rng;

	*error = -EINVAL;
	if (max_bytes > UINT32_MAX || (max_bytes && !rate.bytes))
		return NULL;
	*error = -ENOMEM;
	rng = calloc(1, sizeof(*rng));
	if (!rng)
		return NULL;
	rng->source = source;
	// A limit of fewer bytes holds for each request, too.
	rng->request_max = rate.bytes && max_bytes < SV_RNG_MAX_BYTES ? max_bytes
								      : SV_RNG_MAX_BYTES;
	sv_bucket_init(&rng->bucket, &rate, period_ms * MS);
	device = sv_ring_create(&kind, rng, 1, queue_size, counters, sizeof(*counters), error);
	if (!device) {
		sv_bucket_deinit(&rng->bucket);
		free(rng);
	}
	return device;
}
