#include "uring/pool.h"

#include <string.h>

#include "include/thread.h"
#include "uring/engine.h"

int sv_pool_init(struct sv_pool *pool, int fd)
{
	memset(pool, 0, sizeof(*pool));
	pool->fd = fd;
	pthread_mutex_init(&pool->lock, NULL);
	pthread_cond_init(&pool->wake, NULL);
	return 0;
}

static void *work(void *argument)
{
	struct sv_pool *pool = argument;

	pthread_mutex_lock(&pool->lock);
	for (;;) {
		struct sv_io *io = pool->first;

		if (!io) {
			if (pool->ending)
				break;
			pool->idle++;
			pthread_cond_wait(&pool->wake, &pool->lock);
			pool->idle--;
			continue;
		}
		pool->first = io->next;
		pool->waiting--;
		pthread_mutex_unlock(&pool->lock);
		sv_io_run(io, pool->fd);
		sv_engine_complete(io->engine, io);
		pthread_mutex_lock(&pool->lock);
	}
	pthread_mutex_unlock(&pool->lock);
	return NULL;
}

void sv_pool_submit(struct sv_pool *pool, struct sv_io *io)
{
	bool grow;
	int failed = 0;

	io->next = NULL;
	pthread_mutex_lock(&pool->lock);
	if (pool->first)
		pool->last->next = io;
	else
		pool->first = io;
	pool->last = io;
	pool->waiting++;
	grow = pool->waiting > pool->idle && pool->threads < SV_POOL_MAX_THREADS;
	if (grow) {
		failed = sv_thread_start(&pool->thread[pool->threads], work, pool);
		if (!failed)
			pool->threads++;
	}
	if (failed && !pool->threads) {
		// Not one thread to be had: nobody else will ever take it, so do it here. It is
		// the only one waiting, as every earlier one was done here as well.
		pool->first = NULL;
		pool->waiting = 0;
		pthread_mutex_unlock(&pool->lock);
		sv_io_run(io, pool->fd);
		sv_engine_complete(io->engine, io);
		return;
	}
	pthread_cond_signal(&pool->wake);
	pthread_mutex_unlock(&pool->lock);
}

void sv_pool_deinit(struct sv_pool *pool)
{
	pthread_mutex_lock(&pool->lock);
	pool->ending = true;
	pthread_cond_broadcast(&pool->wake);
	pthread_mutex_unlock(&pool->lock);
	for (unsigned int i = 0; i < pool->threads; i++)
		pthread_join(pool->thread[i], NULL);
	pthread_cond_destroy(&pool->wake);
	pthread_mutex_destroy(&pool->lock);
}
