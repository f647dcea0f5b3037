// The thread of a device: serve what is due, tell the driver, sleep until there is more.
#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>

#include "include/clock.h"
#include "include/thread.h"
#include "ring/internal.h"

#define NO_KICK_NS 1000000 // how often a ring without kick descriptor is looked at
#define SECOND 1000000000ull

static void call_driver(struct sv_ring_queue *queue)
{
	sv_virtq_publish(&queue->vq);
	queue->call_due = false;
	if (!sv_virtq_wants_call(&queue->vq) || queue->call_fd < 0)
		return;
	queue->counters->calls++;
	eventfd_write(queue->call_fd, 1);
}

static void report_broken(struct sv_ring_queue *queue)
{
	if (queue->counters->broken)
		return;
	queue->counters->broken = 1;
	queue->due = queue->listens = queue->wants_kick = false;
	queue->wait_until = 0;
	if (queue->err_fd >= 0)
		eventfd_write(queue->err_fd, 1);
}

void sv_ring_serve(struct sv_ring_device *device, unsigned int index)
{
	struct sv_ring_queue *queue = &device->queues[index];
	enum sv_ring_next next;

	if (queue->listens)
		sv_virtq_disable_kicks(&queue->vq);
	queue->due = queue->listens = false;
	queue->wait_until = 0;
	next = device->kind->serve(device, index);
	queue->due |= next == SV_RING_MORE;
	queue->wants_kick = next == SV_RING_EMPTY;
	// Whatever the batch did to other queues they are told as well: chains of one may be
	// given back by what came over another.
	for (unsigned int i = 0; i < device->count; i++) {
		queue = &device->queues[i];
		if (!queue->running)
			continue;
		if (queue->call_due)
			call_driver(queue);
		if (queue->vq.broken)
			report_broken(queue);
	}
}

// Ask the driver for kicks where one is waited for.
static void listen(struct sv_ring_queue *queue)
{
	if (queue->due || queue->listens || !queue->wants_kick)
		return;
	if (sv_virtq_enable_kicks(&queue->vq))
		queue->due = true; // something came meanwhile
	else if (queue->vq.broken)
		report_broken(queue); // found by looking
	else
		queue->listens = true;
}

// What poll may wait for at most; 0: something is due.
static uint64_t wait_limit(const struct sv_ring_device *device)
{
	uint64_t limit = UINT64_MAX;
	uint64_t now = sv_now_ns();

	for (unsigned int i = 0; i < device->count; i++) {
		const struct sv_ring_queue *queue = &device->queues[i];
		uint64_t wait = UINT64_MAX;

		if (!queue->running)
			continue;
		if (queue->due)
			return 0;
		if (queue->wait_until)
			wait = queue->wait_until > now ? queue->wait_until - now : 0;
		else if (queue->listens && queue->kick_fd < 0)
			wait = NO_KICK_NS;
		if (wait < limit)
			limit = wait;
	}
	return limit;
}

static void take_kick(struct sv_ring_queue *queue, short events)
{
	eventfd_t value;

	if (!queue->listens || (queue->kick_fd >= 0 && !events))
		return;
	queue->due = true;
	if (queue->kick_fd < 0)
		return;
	queue->counters->kicks++;
	// A descriptor that is ready for ever, or for nothing, is looked at as if there were none.
	if (!(events & POLLIN) || (eventfd_read(queue->kick_fd, &value) < 0 && errno != EAGAIN))
		queue->kick_fd = -1;
}

static void do_call(struct sv_ring_device *device)
{
	eventfd_t value;

	eventfd_read(device->wake_fd, &value);
	pthread_mutex_lock(&device->lock);
	if (device->call) {
		device->result = device->call(device, device->argument);
		device->call = NULL;
		pthread_cond_signal(&device->done);
	}
	pthread_mutex_unlock(&device->lock);
}

static void wait_for_work(struct sv_ring_device *device)
{
	struct pollfd fds[1 + SV_RING_MAX_QUEUES + SV_RING_MAX_FDS];
	unsigned int count = 1 + device->count + SV_RING_MAX_FDS;
	struct pollfd *awaited = &fds[1 + device->count];
	struct timespec limit;
	uint64_t wait, now;

	fds[0] = (struct pollfd){device->wake_fd, POLLIN, 0};
	for (unsigned int i = 0; i < device->count; i++) {
		struct sv_ring_queue *queue = &device->queues[i];

		if (queue->running)
			listen(queue);
		fds[1 + i] = (struct pollfd){queue->running && queue->listens ? queue->kick_fd : -1,
					     POLLIN, 0};
	}
	memcpy(awaited, device->awaited, sizeof(device->awaited));
	wait = wait_limit(device);
	limit = (struct timespec){(time_t)(wait / SECOND), (long)(wait % SECOND)};
	if (ppoll(fds, count, wait == UINT64_MAX ? NULL : &limit, NULL) < 0)
		return;
	now = sv_now_ns();
	for (unsigned int i = 0; i < device->count; i++) {
		struct sv_ring_queue *queue = &device->queues[i];

		if (!queue->running)
			continue;
		take_kick(queue, fds[1 + i].revents);
		queue->due |= queue->wait_until && queue->wait_until <= now;
	}
	for (unsigned int slot = 0; slot < SV_RING_MAX_FDS; slot++) {
		if (awaited[slot].revents)
			device->kind->ready(device, slot, awaited[slot].revents);
	}
	// Last: it may stop queues and change descriptors that were polled.
	if (fds[0].revents)
		do_call(device);
}

static void *run(void *argument)
{
	struct sv_ring_device *device = argument;

	while (!device->stop) {
		for (unsigned int i = 0; i < device->count; i++) {
			if (device->queues[i].running && device->queues[i].due)
				sv_ring_serve(device, i);
		}
		wait_for_work(device);
	}
	return NULL;
}

int sv_ring_begin_thread(struct sv_ring_device *device)
{
	device->stop = false;
	return sv_thread_start(&device->thread, run, device);
}
