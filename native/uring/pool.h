// A bounded pool of threads for what io_uring can't do, or for everything where a host
// forbids io_uring. Threads start when there is work for them and stay until the end.
#pragma once

#include <pthread.h>
#include <stdbool.h>

#include "uring/io.h"

#define SV_POOL_MAX_THREADS 16

struct sv_pool {
	pthread_mutex_t lock;
	pthread_cond_t wake;
	struct sv_io *first, *last; // waiting
	unsigned int waiting;
	unsigned int idle;
	unsigned int threads;
	bool ending;
	int fd;
	pthread_t thread[SV_POOL_MAX_THREADS];
};

int sv_pool_init(struct sv_pool *pool, int fd);
// Waits for what is under way.
void sv_pool_deinit(struct sv_pool *pool);

// Start `io`; its engine is told when it is done (sv_engine_complete, on the pool's thread).
void sv_pool_submit(struct sv_pool *pool, struct sv_io *io);
