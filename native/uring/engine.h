// What a queue's thread submits operations to, and reaps them from: io_uring or threads.
#pragma once

#include <liburing.h>
#include <pthread.h>
#include <stdbool.h>

#include "uring/io.h"
#include "uring/pool.h"

enum sv_engine_kind {
	SV_ENGINE_THREADS,
	SV_ENGINE_URING,      // the rings take a disk's operations on the image, nothing else
	SV_ENGINE_URING_FREE, // ... unrestricted: the sandbox's stage io-uring is off
};

// Used by one thread at a time; only sv_engine_complete may come from another one.
struct sv_engine {
	enum sv_engine_kind kind;
	struct sv_pool *pool;
	struct io_uring ring;      // its file 0 is the image
	unsigned int unsubmitted;
	unsigned int in_ring;
	unsigned int in_pool;
	int event_fd;              // readable when the pool has finished something; borrowed
	pthread_mutex_t lock;      // `done`, with the pool's threads
	struct sv_io *done;        // finished by the pool
	struct sv_io *reaped;      // taken off `done`, not yet handed out
	bool polled;               // something may be in `done`
};

// Whether this process may have io_uring, restricted as SV_ENGINE_URING or not: 0, or a
// negative errno (restrictions need Linux 5.10).
int sv_uring_probe(bool restricted);

// `entries`: how many operations may be on the way at once. `fd`: the image.
// -EPERM, -ENOSYS, -ENOMEM...: io_uring is not to be had here.
int sv_engine_init(struct sv_engine *engine, enum sv_engine_kind kind, unsigned int entries,
		   int fd, struct sv_pool *pool, int event_fd);
void sv_engine_deinit(struct sv_engine *engine);

// Take over `io`; it starts at the next flush at the latest.
void sv_engine_submit(struct sv_engine *engine, struct sv_io *io);
void sv_engine_flush(struct sv_engine *engine);

// The next finished operation, or NULL.
struct sv_io *sv_engine_reap(struct sv_engine *engine);
// Whether reap has something to give, as cheaply as can be.
bool sv_engine_ready(struct sv_engine *engine);

// Descriptor that is readable when the ring has completions; -1 if there is no ring.
int sv_engine_fd(const struct sv_engine *engine);

static inline unsigned int sv_engine_busy(const struct sv_engine *engine)
{
	return engine->in_ring + engine->in_pool;
}

// The pool's threads hand back what they did.
void sv_engine_complete(struct sv_engine *engine, struct sv_io *io);
