// One queue and its thread; used by plane.c only.
#pragma once

#include <pthread.h>

#include "dataplane/dataplane.h"
#include "include/polling.h"
#include "virtq/signals.h"

struct sv_queue {
	struct sv_virtq vq;
	struct sv_engine engine;
	struct sv_blk_queue blk;
	struct sv_blk_counters *counters;
	pthread_t thread;
	bool running;          // control thread's
	bool stop;             // atomic: control thread asks, queue's thread obeys
	int epoll_fd;
	int wake_fd;           // signalled for stop and by the pool
	int kick_fd;           // borrowed; -1: poll
	struct sv_signals signals;
	uint64_t poll_limit;   // ns
	struct sv_polling driver_polling; // while nothing is on its way: for requests
	struct sv_polling disk_polling;   // else: for completions above all
};

int sv_queue_init(struct sv_queue *queue, struct sv_disk *disk, enum sv_engine_kind kind,
		  unsigned int size, struct sv_pool *pool, struct sv_blk_counters *counters);
void sv_queue_deinit(struct sv_queue *queue);

int sv_queue_run(struct sv_queue *queue, const struct sv_memory *memory,
		 const struct sv_ring_setup *setup, struct sv_inflight_queue *inflight);
int sv_queue_end(struct sv_queue *queue);
