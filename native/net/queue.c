// A queue's thread: serve a batch, tell the driver, sleep until there is more.
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "include/clock.h"
#include "include/thread.h"
#include "net/internal.h"

#define NO_KICK_NS 1000000 // how often a ring without kick descriptor is looked at
#define ROUNDS_A_CALL 3  // of batches while there is more to do
#define SECOND 1000000000ull

static void call_driver(struct sv_net_queue *queue)
{
	queue->call_due = false;
	queue->patience = ROUNDS_A_CALL - 1;
	if (sv_virtq_wants_call(&queue->vq))
		sv_signals_call(&queue->signals, &queue->counters->calls);
}

// Publish what was used, and call for it: at once after a sleep, so that the driver begins, and at
// the end of work; else every few rounds, because to wake a driver costs as much as some frames,
// and one that is at work finds what is published without a call.
static void tell_driver(struct sv_net_queue *queue, bool more)
{
	sv_virtq_publish(&queue->vq);
	if (more && queue->patience)
		queue->patience--;
	else
		call_driver(queue);
}

static bool serve_batch(struct sv_net_queue *queue)
{
	switch (queue->kind) {
	case SV_NET_RECEIVE: return sv_net_receive(queue);
	case SV_NET_TRANSMIT: return sv_net_transmit(queue);
	default: return sv_net_control(queue);
	}
}

// What the tap must be able to do before it is worth looking again; 0: nothing.
static short awaited(const struct sv_net_queue *queue)
{
	if (queue->vq.broken || queue->wait_until)
		return 0;
	if (queue->kind == SV_NET_TRANSMIT)
		return queue->chain_waits ? POLLOUT : 0;
	// Without buffers the frames stay with the tap.
	return queue->kind == SV_NET_RECEIVE && queue->tap_empty ? POLLIN : 0;
}

static bool needs_kick(const struct sv_net_queue *queue)
{
	if (queue->wait_until || queue->chain_waits)
		return false;
	return queue->kind != SV_NET_RECEIVE || !queue->tap_empty;
}

// Look at the ring for a while, if a chain usually comes soon. True: there is something to do. Not
// at the tap: a frame that comes while the thread wakes is taken along by the same wake-up, and
// the more come, the less each costs.
static bool poll_ring(struct sv_net_queue *queue)
{
	uint64_t start;

	if (queue->kind == SV_NET_CONTROL || queue->vq.broken || !needs_kick(queue) ||
	    !sv_polling_may(&queue->polling))
		return false;
	start = sv_now_ns();
	for (unsigned int i = 0;; i++) {
		// To look may be what breaks the queue: that is reported before sleeping.
		if (sv_virtq_pending(&queue->vq) || queue->vq.broken ||
		    __atomic_load_n(&queue->stop, __ATOMIC_RELAXED)) {
			sv_polling_note(&queue->polling, true);
			return true;
		}
		sv_relax();
		if (i % 8 == 7 && sv_now_ns() - start > SV_POLL_NS)
			break;
	}
	sv_polling_note(&queue->polling, false);
	return false;
}

static void sleep_until_work(struct sv_net_queue *queue)
{
	struct pollfd fds[3] = {{queue->wake_fd, POLLIN, 0}, {-1, POLLIN, 0},
				{queue->tap, awaited(queue), 0}};
	struct timespec limit = {0, 0};
	bool timed = false;
	eventfd_t value;

	if (!queue->vq.broken && needs_kick(queue)) {
		if (sv_virtq_enable_kicks(&queue->vq))
			return;
		if (queue->vq.broken)
			return; // found by looking: reported first
		fds[1].fd = queue->kick_fd;
		timed = queue->kick_fd < 0;
		limit.tv_nsec = NO_KICK_NS;
	}
	if (queue->wait_until) {
		uint64_t now = sv_now_ns();
		uint64_t wait = queue->wait_until > now ? queue->wait_until - now : 0;

		timed = true;
		limit.tv_sec = (time_t)(wait / SECOND);
		limit.tv_nsec = (long)(wait % SECOND);
	}
	// An error of the tap (POLLERR is always reported) must not make this loop spin.
	if (!fds[2].events)
		fds[2].fd = -1;
	ppoll(fds, 3, timed ? &limit : NULL, NULL);
	queue->patience = 0;
	sv_virtq_disable_kicks(&queue->vq);
	queue->counters->wakeups++;
	if (fds[1].revents)
		eventfd_read(queue->kick_fd, &value);
	if (fds[2].revents & (POLLERR | POLLNVAL | POLLHUP) && !(fds[2].revents & fds[2].events)) {
		// The interface is gone for good.
		queue->tap = -1;
	}
}

static void *serve(void *argument)
{
	struct sv_net_queue *queue = argument;

	sv_virtq_disable_kicks(&queue->vq);
	while (!__atomic_load_n(&queue->stop, __ATOMIC_ACQUIRE)) {
		bool more = !queue->vq.broken && serve_batch(queue);

		if (queue->call_due)
			tell_driver(queue, more);
		if (queue->vq.broken)
			sv_signals_broken(&queue->signals, &queue->counters->broken);
		if (!more && !poll_ring(queue))
			sleep_until_work(queue);
	}
	if (queue->call_due)
		tell_driver(queue, false);
	return NULL;
}

int sv_net_queue_init(struct sv_net_queue *queue)
{
	int ret = sv_signals_init(&queue->signals);

	queue->kick_fd = -1;
	queue->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (queue->kind == SV_NET_RECEIVE)
		queue->bounce = malloc(SV_NET_FRAME_MAX);
	if (queue->wake_fd < 0)
		ret = -EMFILE;
	else if (queue->kind == SV_NET_RECEIVE && !queue->bounce)
		ret = -ENOMEM;
	if (ret < 0)
		sv_net_queue_deinit(queue);
	return ret;
}

void sv_net_queue_deinit(struct sv_net_queue *queue)
{
	if (queue->wake_fd >= 0)
		close(queue->wake_fd);
	sv_signals_deinit(&queue->signals);
	free(queue->bounce);
}

int sv_net_queue_run(struct sv_net_queue *queue, const struct sv_net_ring *ring)
{
	int ret = sv_virtq_start(&queue->vq, &queue->net->memory, ring->size, ring->desc,
				 ring->avail, ring->used, queue->net->features, ring->base, NULL);

	if (ret < 0)
		return ret;
	ret = sv_signals_begin(&queue->signals, ring->call_fd, ring->err_fd);
	if (ret < 0)
		return ret;
	queue->kick_fd = ring->kick_fd;
	queue->features = queue->net->features;
	queue->filter_version = UINT64_MAX; // copied with the first frame
	queue->counters->broken = 0;
	queue->tap_empty = queue->chain_waits = queue->call_due = false;
	queue->waiting = 0;
	queue->patience = 0;
	sv_polling_init(&queue->polling);
	queue->wait_until = 0;
	queue->expected = SV_NET_HEADER + 1514;
	queue->stop = false;
	ret = sv_thread_start(&queue->thread, serve, queue);
	if (ret < 0)
		sv_signals_end(&queue->signals);
	queue->running = ret == 0;
	return ret;
}

int sv_net_queue_end(struct sv_net_queue *queue)
{
	eventfd_t value;

	if (!queue->running)
		return -EINVAL;
	__atomic_store_n(&queue->stop, true, __ATOMIC_RELEASE);
	eventfd_write(queue->wake_fd, 1);
	pthread_join(queue->thread, NULL);
	eventfd_read(queue->wake_fd, &value);
	queue->running = false;
	if (queue->chain_waits)
		sv_virtq_unpop(&queue->vq, queue->chain.head);
	if (queue->waiting)
		queue->counters->dropped++;
	sv_net_release_held(queue);
	sv_virtq_stop(&queue->vq);
	sv_signals_end(&queue->signals);
	return queue->vq.last_avail;
}
