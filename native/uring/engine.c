#include "uring/engine.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

// Not every build of liburing 2.3 exports the functions for these two.
static int register_bare(const struct io_uring *ring, unsigned int opcode, void *argument,
			 unsigned int count)
{
	return syscall(SYS_io_uring_register, ring->ring_fd, opcode, argument, count) < 0 ? -errno
											  : 0;
}

// The ring's own filter: nothing but the operations of a disk, on its registered file alone.
static int restrict_ring(struct io_uring *ring)
{
	static const uint8_t operations[] = {
		IORING_OP_READ, IORING_OP_READV, IORING_OP_WRITE, IORING_OP_WRITEV,
		IORING_OP_FSYNC, IORING_OP_FALLOCATE,
	};
	enum { COUNT = sizeof(operations) / sizeof(*operations) };
	struct io_uring_restriction rules[COUNT + 1] = {{
		.opcode = IORING_RESTRICTION_SQE_FLAGS_REQUIRED,
		.sqe_flags = IOSQE_FIXED_FILE,
	}};

	for (unsigned int i = 0; i < COUNT; i++) {
		rules[i + 1].opcode = IORING_RESTRICTION_SQE_OP;
		rules[i + 1].sqe_op = operations[i];
	}
	// No rule allows a registration: the table of files stays as it is.
	return register_bare(ring, IORING_REGISTER_RESTRICTIONS, rules, COUNT + 1);
}

static int open_ring(struct sv_engine *engine, unsigned int entries, int fd, bool restricted)
{
	// COOP_TASKRUN (Linux 5.19): completions don't interrupt the thread, it meets them on
	// its next way into the kernel; the flag says that a way there is due.
	unsigned int disabled = restricted ? IORING_SETUP_R_DISABLED : 0;
	struct io_uring_params params = {.flags = IORING_SETUP_COOP_TASKRUN | disabled |
						  IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_CLAMP};
	int ret = io_uring_queue_init_params(entries, &engine->ring, &params);

	if (ret == -EINVAL) {
		params = (struct io_uring_params){.flags = IORING_SETUP_CLAMP | disabled};
		ret = io_uring_queue_init_params(entries, &engine->ring, &params);
	}
	if (ret < 0)
		return ret;
	// A registered file needs no reference counting per operation.
	ret = io_uring_register_files(&engine->ring, &fd, 1);
	if (!ret && restricted)
		ret = restrict_ring(&engine->ring);
	if (!ret && restricted)
		ret = register_bare(&engine->ring, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
	if (ret < 0)
		io_uring_queue_exit(&engine->ring);
	return ret;
}

int sv_uring_probe(bool restricted)
{
	struct sv_engine engine;
	int fd, ret;

	fd = eventfd(0, EFD_CLOEXEC);
	if (fd < 0)
		return -errno;
	ret = open_ring(&engine, 1, fd, restricted);
	if (!ret)
		io_uring_queue_exit(&engine.ring);
	close(fd);
	return ret;
}

int sv_engine_init(struct sv_engine *engine, enum sv_engine_kind kind, unsigned int entries,
		   int fd, struct sv_pool *pool, int event_fd)
{
	memset(engine, 0, sizeof(*engine));
	engine->kind = kind;
	engine->pool = pool;
	engine->event_fd = event_fd;
	engine->ring.ring_fd = -1;
	pthread_mutex_init(&engine->lock, NULL);
	if (kind != SV_ENGINE_THREADS) {
		int ret = open_ring(engine, entries, fd, kind == SV_ENGINE_URING);

		if (ret < 0) {
			pthread_mutex_destroy(&engine->lock);
			return ret;
		}
	}
	return 0;
}

void sv_engine_deinit(struct sv_engine *engine)
{
	if (engine->kind != SV_ENGINE_THREADS)
		io_uring_queue_exit(&engine->ring);
	pthread_mutex_destroy(&engine->lock);
}

int sv_engine_fd(const struct sv_engine *engine)
{
	return engine->kind != SV_ENGINE_THREADS ? engine->ring.ring_fd : -1;
}

static void prepare(struct io_uring_sqe *sqe, struct sv_io *io)
{
	switch (io->op) {
	case SV_IO_READ:
		// The plain operation spares the kernel the import of an iovec.
		if (io->count == 1)
			io_uring_prep_read(sqe, 0, io->iov->iov_base, (unsigned int)io->iov->iov_len,
					   io->offset);
		else
			io_uring_prep_readv(sqe, 0, io->iov, io->count, io->offset);
		sqe->rw_flags = io->flags;
		break;
	case SV_IO_WRITE:
		if (io->count == 1)
			io_uring_prep_write(sqe, 0, io->iov->iov_base,
					    (unsigned int)io->iov->iov_len, io->offset);
		else
			io_uring_prep_writev(sqe, 0, io->iov, io->count, io->offset);
		sqe->rw_flags = io->flags;
		break;
	case SV_IO_FDATASYNC:
		io_uring_prep_fsync(sqe, 0, IORING_FSYNC_DATASYNC);
		break;
	default:
		io_uring_prep_fallocate(sqe, 0, io->flags, (off_t)io->offset, (off_t)io->length);
		break;
	}
	sqe->flags |= IOSQE_FIXED_FILE;
	io_uring_sqe_set_data(sqe, io);
}

void sv_engine_submit(struct sv_engine *engine, struct sv_io *io)
{
	struct io_uring_sqe *sqe;

	io->engine = engine;
	if (engine->kind == SV_ENGINE_THREADS || io->op == SV_IO_DISCARD) {
		engine->in_pool++;
		sv_pool_submit(engine->pool, io);
		return;
	}
	sqe = io_uring_get_sqe(&engine->ring);
	if (!sqe) {
		sv_engine_flush(engine);
		sqe = io_uring_get_sqe(&engine->ring);
	}
	if (!sqe) {
		// The kernel takes no more now: the pool always does.
		engine->in_pool++;
		sv_pool_submit(engine->pool, io);
		return;
	}
	prepare(sqe, io);
	engine->unsubmitted++;
	engine->in_ring++;
}

void sv_engine_flush(struct sv_engine *engine)
{
	while (engine->unsubmitted) {
		int ret = io_uring_submit(&engine->ring);

		if (ret > 0) {
			engine->unsubmitted -= (unsigned int)ret;
			continue;
		}
		// Out of memory or too many completions waiting: what is on its way first, the
		// caller reaps and comes back. It never sleeps while something is unsubmitted.
		if (ret != -EINTR)
			return;
	}
}

void sv_engine_complete(struct sv_engine *engine, struct sv_io *io)
{
	int event_fd = engine->event_fd;

	pthread_mutex_lock(&engine->lock);
	io->next = engine->done;
	engine->done = io;
	// Under the lock: once the last operation is reaped the engine may go away.
	__atomic_store_n(&engine->polled, true, __ATOMIC_RELEASE);
	eventfd_write(event_fd, 1);
	pthread_mutex_unlock(&engine->lock);
}

static struct sv_io *reap_pool(struct sv_engine *engine)
{
	struct sv_io *io;

	if (!engine->reaped) {
		if (!__atomic_load_n(&engine->polled, __ATOMIC_ACQUIRE))
			return NULL;
		pthread_mutex_lock(&engine->lock);
		engine->reaped = engine->done;
		engine->done = NULL;
		__atomic_store_n(&engine->polled, false, __ATOMIC_RELAXED);
		pthread_mutex_unlock(&engine->lock);
	}
	io = engine->reaped;
	if (io) {
		engine->reaped = io->next;
		engine->in_pool--;
	}
	return io;
}

bool sv_engine_ready(struct sv_engine *engine)
{
	if (__atomic_load_n(&engine->polled, __ATOMIC_ACQUIRE) || engine->reaped)
		return true;
	if (engine->kind == SV_ENGINE_THREADS || !engine->in_ring)
		return false;
	return io_uring_cq_ready(&engine->ring) ||
	       (IO_URING_READ_ONCE(*engine->ring.sq.kflags) &
		(IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW));
}

struct sv_io *sv_engine_reap(struct sv_engine *engine)
{
	struct io_uring_cqe *cqe;
	struct sv_io *io = reap_pool(engine);

	if (io || engine->kind == SV_ENGINE_THREADS || !engine->in_ring)
		return io;
	// With COOP_TASKRUN finished work may wait for our next way into the kernel: peek
	// enters it when the ring says so.
	if (io_uring_peek_cqe(&engine->ring, &cqe) < 0)
		return NULL;
	io = io_uring_cqe_get_data(cqe);
	io->result = cqe->res;
	io_uring_cqe_seen(&engine->ring, cqe);
	engine->in_ring--;
	return io;
}
