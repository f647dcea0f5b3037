// The queues of a balloon, and the statistics that go the other way round.
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <linux/virtio_balloon.h>

#include "balloon/internal.h"

#define STATISTICS_QUEUE 2u
#define ENTRY_BYTES 10 // struct virtio_balloon_stat

enum role { INFLATE, DEFLATE, STATISTICS, REPORTING, NOBODY };

static bool has(const struct sv_ring_device *device, unsigned int feature)
{
	return device->features & 1ull << feature;
}

// See SV_BALLOON_QUEUES.
static enum role role_of(const struct sv_ring_device *device, unsigned int index)
{
	unsigned int after = STATISTICS_QUEUE;

	if (index < STATISTICS_QUEUE)
		return index ? DEFLATE : INFLATE;
	if (has(device, VIRTIO_BALLOON_F_STATS_VQ) && index == after++)
		return STATISTICS;
	if (has(device, VIRTIO_BALLOON_F_REPORTING) &&
	    (index == after || index == SV_BALLOON_QUEUES - 1))
		return REPORTING;
	return NOBODY;
}

// Take the next chain, unless there is one already.
static bool hold(struct sv_ring_device *device, unsigned int index)
{
	struct work *work = &((struct balloon *)device->own)->work[index];

	if (!work->held && sv_virtq_pop(&device->queues[index].vq, &work->chain) > 0)
		sv_balloon_begin(device, index);
	return work->held;
}

static void give_back(struct sv_ring_device *device, unsigned int index)
{
	struct work *work = &((struct balloon *)device->own)->work[index];

	work->held = false;
	sv_ring_push(device, index, work->chain.head, 0);
}

static enum sv_ring_next serve_pages(struct sv_ring_device *device, unsigned int index,
				     enum role role)
{
	bool done;

	if (!hold(device, index))
		return SV_RING_EMPTY;
	done = role == REPORTING ? sv_balloon_ranges(device, index)
				 : sv_balloon_pfns(device, index, role == INFLATE);
	if (done)
		give_back(device, index);
	return SV_RING_MORE;
}

// 5.5.6.3: an array of tags and values, in any order.
static void read_statistics(struct balloon *balloon, struct work *work)
{
	struct sv_balloon_news *news = &balloon->news;
	uint8_t entry[ENTRY_BYTES];

	news->told = true;
	news->present = 0;
	for (unsigned int i = 0; i < SV_BALLOON_MAX_ENTRIES; i++) {
		uint16_t tag;
		uint64_t value;

		if (sv_balloon_read(work, entry, sizeof(entry)) < sizeof(entry))
			return;
		memcpy(&tag, entry, sizeof(tag));
		memcpy(&value, entry + sizeof(tag), sizeof(value));
		tag = le16toh(tag);
		if (tag >= SV_BALLOON_TAGS)
			continue;
		news->present |= 1u << tag;
		news->values[tag] = le64toh(value);
	}
}

// One buffer of the driver is held until somebody wants statistics. What it holds before that is
// old, or nothing at all: Linux before 4.11 primes the queue with a buffer of zeroes.
static enum sv_ring_next serve_statistics(struct sv_ring_device *device, unsigned int index)
{
	struct balloon *balloon = device->own;
	struct work *work = &balloon->work[index];

	// At most once round for each order: the second buffer is the answer.
	for (;;) {
		bool fresh = !work->held;

		if (!hold(device, index))
			return SV_RING_EMPTY;
		if (fresh && balloon->asked) {
			balloon->asked = balloon->wanted = false;
			counters_of(device, index)->reports++;
			read_statistics(balloon, work);
			sv_ring_notify(device);
		}
		if (!balloon->wanted || balloon->asked)
			return SV_RING_EMPTY;
		balloon->asked = true;
		give_back(device, index);
	}
}

static enum sv_ring_next serve(struct sv_ring_device *device, unsigned int index)
{
	enum role role = role_of(device, index);

	switch (role) {
	case STATISTICS:
		return serve_statistics(device, index);
	case NOBODY:
		sv_virtq_break(&device->queues[index].vq, "a queue that was not negotiated");
		return SV_RING_EMPTY;
	default:
		return serve_pages(device, index, role);
	}
}

static void stopping(struct sv_ring_device *device, unsigned int index)
{
	struct work *work = &((struct balloon *)device->own)->work[index];

	// To remove the same pages once more does no harm: the driver has not been told yet.
	if (work->held)
		sv_virtq_unpop(&device->queues[index].vq, work->chain.head);
	work->held = false;
}

static void negotiated(struct sv_ring_device *device)
{
	sv_balloon_forget(device->own);
}

static void reset(struct sv_ring_device *device)
{
	struct balloon *balloon = device->own;

	sv_balloon_forget(balloon);
	balloon->asked = balloon->wanted = false;
}

static void destroy(struct sv_ring_device *device)
{
	sv_balloon_forget(device->own);
	free(device->own);
}

static const struct sv_ring_kind kind = {
	.serve = serve,
	.stopping = stopping,
	.negotiated = negotiated,
	.reset = reset,
	.destroy = destroy,
};

struct sv_ring_device *sv_balloon_create(bool keep, unsigned int queue_size,
					 struct sv_balloon_counters *counters, int *error)
{
	struct balloon *balloon = calloc(1, sizeof(*balloon));
	struct sv_ring_device *device;

	*error = -ENOMEM;
	if (!balloon)
		return NULL;
	balloon->keep = keep;
	device = sv_ring_create(&kind, balloon, SV_BALLOON_QUEUES, queue_size, counters,
				sizeof(*counters), error);
	if (!device)
		free(balloon);
	return device;
}

static int ask(struct sv_ring_device *device, void *argument)
{
	struct sv_ring_queue *queue = &device->queues[STATISTICS_QUEUE];

	if (role_of(device, STATISTICS_QUEUE) != STATISTICS || !queue->running || queue->vq.broken)
		return -ENOTCONN;
	((struct balloon *)device->own)->wanted = true;
	sv_ring_due(device, STATISTICS_QUEUE);
	return 0;
}

int sv_balloon_ask(struct sv_ring_device *device)
{
	return sv_ring_call(device, ask, NULL);
}

static int take(struct sv_ring_device *device, void *argument)
{
	struct sv_balloon_news *news = &((struct balloon *)device->own)->news;

	memcpy(argument, news, sizeof(*news));
	*news = (struct sv_balloon_news){0};
	return 0;
}

void sv_balloon_take(struct sv_ring_device *device, struct sv_balloon_news *news)
{
	sv_ring_call(device, take, news);
}
