#include "dataplane/queue.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "include/clock.h"
#include "include/thread.h"

#define BUDGET 64          // requests taken before completions are looked at
// The same where each goes to the disk: it had better begin before all are prepared, or driver and
// disk take turns instead of working at the same time.
#define DIRECT_BUDGET 8
#define HELD_MS 1000       // a throttled request is looked at that often at least
#define NO_KICK_MS 1       // how often a ring without kick descriptor is looked at

static void call_driver(struct sv_queue *queue)
{
	queue->blk.inline_bytes = 0;
	sv_blk_note_latencies(&queue->blk);
	sv_virtq_publish(&queue->vq);
	if (sv_virtq_wants_call(&queue->vq))
		sv_signals_call(&queue->signals, &queue->counters->calls);
}

// One round: take, start, finish, tell. True if there was something to do.
static bool round_once(struct sv_queue *queue, bool take)
{
	unsigned int budget = queue->blk.disk->direct ? DIRECT_BUDGET : BUDGET;
	bool progress = sv_blk_release(&queue->blk);

	progress |= take && sv_blk_serve(&queue->blk, budget);
	if (queue->engine.unsubmitted)
		sv_engine_flush(&queue->engine);
	progress |= sv_blk_reap(&queue->blk);
	// What was finished may have needed another step (a short transfer, a sync).
	if (queue->engine.unsubmitted)
		sv_engine_flush(&queue->engine);
	if (progress)
		call_driver(queue);
	if (queue->vq.broken)
		sv_signals_broken(&queue->signals, &queue->counters->broken);
	return progress;
}

static bool is_due(struct sv_queue *queue)
{
	if (sv_engine_ready(&queue->engine) ||
	    (!sv_blk_blocked(&queue->blk) && sv_virtq_pending(&queue->vq)))
		return true;
	// To look may have been what broke the queue: that must be reported before sleeping.
	return __atomic_load_n(&queue->stop, __ATOMIC_RELAXED) ||
	       (queue->vq.broken && !queue->counters->broken);
}

// Look for work for a while, if it usually comes soon. True: there is work.
static bool poll_work(struct sv_queue *queue)
{
	// How soon the disk is done says nothing of how soon the driver wants more: each has its own
	// record. The disk wakes this thread at less cost than a driver's kick, so it gets less time.
	bool disk = queue->blk.busy;
	struct sv_polling *polling = disk ? &queue->disk_polling : &queue->driver_polling;
	uint64_t limit = disk ? queue->poll_limit / 2 : queue->poll_limit;
	uint64_t start = sv_now_ns();

	if (!limit || sv_blk_blocked(&queue->blk) || !sv_polling_may(polling))
		return false;
	for (unsigned int i = 0;; i++) {
		if (is_due(queue)) {
			sv_polling_note(polling, true);
			return true;
		}
		sv_relax();
		if (i % 8 == 7 && sv_now_ns() - start > limit)
			break;
	}
	sv_polling_note(polling, false);
	return false;
}

// How long to sleep at most; -1: until something happens.
static int sleep_limit(const struct sv_queue *queue)
{
	uint64_t now, wait;

	if (queue->kick_fd < 0 || queue->engine.unsubmitted)
		return NO_KICK_MS;
	if (!queue->blk.held)
		return -1;
	// Limits may change meanwhile: then another time holds.
	now = sv_now_ns();
	wait = queue->blk.held_until > now ? queue->blk.held_until - now : 0;
	return wait < HELD_MS * 1000000ull ? (int)((wait + 999999) / 1000000) : HELD_MS;
}

static void sleep_until_work(struct sv_queue *queue)
{
	// Who takes nothing now wants no kicks: it looks at the ring when it takes again.
	bool kicks = !sv_blk_blocked(&queue->blk);
	struct epoll_event events[3];
	int count;

	if ((kicks && sv_virtq_enable_kicks(&queue->vq)) || is_due(queue))
		return;
	count = epoll_wait(queue->epoll_fd, events, 3, sleep_limit(queue));
	if (kicks)
		sv_virtq_disable_kicks(&queue->vq);
	queue->counters->wakeups++;
	for (int i = 0; i < count; i++) {
		eventfd_t value;

		// The kick is edge-triggered and needs no read; the ring is emptied by reaping.
		if (events[i].data.fd == queue->wake_fd)
			eventfd_read(queue->wake_fd, &value);
	}
}

static void *serve(void *argument)
{
	struct sv_queue *queue = argument;

	sv_virtq_disable_kicks(&queue->vq);
	for (;;) {
		bool stop = __atomic_load_n(&queue->stop, __ATOMIC_ACQUIRE);
		// What a predecessor had taken counts as in flight: stop finishes it too.
		bool take = !stop || queue->vq.resubmit_next < queue->vq.resubmit_count;

		// Stop doesn't wait for limits: the one request that they hold back goes at once.
		queue->blk.draining = stop;
		if (round_once(queue, take && !queue->vq.broken))
			continue;
		if (stop && !queue->blk.busy && (!take || queue->vq.broken))
			return NULL;
		if (!stop && poll_work(queue))
			continue;
		if (stop) {
			// Only completions matter now; is_due would find the stop itself.
			struct epoll_event event;
			eventfd_t value;

			epoll_wait(queue->epoll_fd, &event, 1, 1);
			eventfd_read(queue->wake_fd, &value);
			continue;
		}
		sleep_until_work(queue);
	}
}

static int watch(int epoll_fd, int fd, uint32_t events)
{
	struct epoll_event event = {.events = events, .data.fd = fd};

	return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

int sv_queue_init(struct sv_queue *queue, struct sv_disk *disk, enum sv_engine_kind kind,
		  unsigned int size, struct sv_pool *pool, struct sv_blk_counters *counters)
{
	int ret;

	memset(queue, 0, sizeof(*queue));
	queue->counters = counters;
	queue->kick_fd = -1;
	queue->poll_limit = SV_POLL_NS;
	queue->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	queue->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	ret = queue->epoll_fd < 0 || queue->wake_fd < 0 ? -errno : 0;
	if (sv_signals_init(&queue->signals) < 0 && !ret)
		ret = -EMFILE;
	if (ret < 0)
		goto close_fds;
	ret = sv_engine_init(&queue->engine, kind, size, disk->fd, pool, queue->wake_fd);
	if (ret < 0)
		goto close_fds;
	ret = sv_blk_init(&queue->blk, disk, &queue->vq, &queue->engine, counters, size);
	if (ret < 0)
		goto deinit_engine;
	ret = watch(queue->epoll_fd, queue->wake_fd, EPOLLIN);
	if (!ret && sv_engine_fd(&queue->engine) >= 0)
		ret = watch(queue->epoll_fd, sv_engine_fd(&queue->engine), EPOLLIN);
	if (ret < 0)
		goto deinit_blk;
	return 0;

deinit_blk:
	sv_blk_deinit(&queue->blk);
deinit_engine:
	sv_engine_deinit(&queue->engine);
close_fds:
	close(queue->epoll_fd);
	close(queue->wake_fd);
	sv_signals_deinit(&queue->signals);
	return ret;
}

void sv_queue_deinit(struct sv_queue *queue)
{
	sv_blk_deinit(&queue->blk);
	sv_engine_deinit(&queue->engine);
	close(queue->epoll_fd);
	close(queue->wake_fd);
	sv_signals_deinit(&queue->signals);
}

static void forget_kick(struct sv_queue *queue)
{
	if (queue->kick_fd >= 0)
		epoll_ctl(queue->epoll_fd, EPOLL_CTL_DEL, queue->kick_fd, NULL);
	queue->kick_fd = -1;
}

int sv_queue_run(struct sv_queue *queue, const struct sv_memory *memory,
		 const struct sv_ring_setup *setup, struct sv_inflight_queue *inflight)
{
	int ret;

	ret = sv_virtq_start(&queue->vq, memory, setup->size, setup->desc, setup->avail,
			     setup->used, setup->features, setup->base, inflight);
	if (ret < 0)
		return ret;
	ret = sv_signals_begin(&queue->signals, setup->call_fd, setup->err_fd);
	if (ret < 0)
		return ret;
	if (setup->kick_fd >= 0) {
		ret = watch(queue->epoll_fd, setup->kick_fd, EPOLLIN | EPOLLET);
		if (ret < 0)
			goto undo;
		queue->kick_fd = setup->kick_fd;
	}
	queue->counters->broken = 0;
	sv_polling_init(&queue->driver_polling);
	sv_polling_init(&queue->disk_polling);
	queue->stop = false;
	ret = sv_thread_start(&queue->thread, serve, queue);
	if (ret < 0)
		goto undo;
	queue->running = true;
	return 0;

undo:
	forget_kick(queue);
	sv_signals_end(&queue->signals);
	return ret;
}

int sv_queue_end(struct sv_queue *queue)
{
	if (!queue->running)
		return -EINVAL;
	__atomic_store_n(&queue->stop, true, __ATOMIC_RELEASE);
	eventfd_write(queue->wake_fd, 1);
	pthread_join(queue->thread, NULL);
	queue->running = false;
	sv_virtq_stop(&queue->vq);
	forget_kick(queue);
	sv_signals_end(&queue->signals);
	return queue->vq.last_avail;
}
