#include "intercept.h"

// Here they are the real ones.
#undef pthread_create
#undef pthread_join
#undef pthread_cond_wait
#undef ppoll
#undef clock_gettime
#undef ioctl
#undef readv
#undef writev
#undef write
#undef syscall
#undef madvise

#include <errno.h>
#include <stdarg.h>
#include <sys/syscall.h>

#include "system.h"

#include "tape.h"

#define SECOND 1000000000ull
#define TICK 2000 // ns that pass from one look at the clock to the next one

struct fuzz_system fuzz_system;

int fuzz_thread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *),
		       void *argument)
{
	if (!fuzz_system.create)
		return pthread_create(thread, attr, run, argument);
	*thread = 0;
	return fuzz_system.create(run, argument);
}

int fuzz_thread_join(pthread_t thread, void **result)
{
	if (!fuzz_system.create)
		return pthread_join(thread, result);
	if (fuzz_system.join)
		fuzz_system.join();
	return 0;
}

int fuzz_cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex)
{
	if (!fuzz_system.cond_wait)
		return pthread_cond_wait(cond, mutex);
	pthread_mutex_unlock(mutex);
	fuzz_system.cond_wait(mutex);
	return pthread_mutex_lock(mutex);
}

int fuzz_ppoll(struct pollfd *fds, nfds_t count, const struct timespec *limit,
	       const sigset_t *mask)
{
	if (!fuzz_system.ppoll)
		return ppoll(fds, count, limit, mask);
	return fuzz_system.ppoll(fds, count, limit);
}

int fuzz_look(struct pollfd *fds, nfds_t count, const struct timespec *limit)
{
	int ready = poll(fds, count, 0);

	if (!ready && limit) {
		CHECK(limit->tv_sec >= 0 && limit->tv_nsec >= 0 && limit->tv_nsec < (long)SECOND);
		// A day at most: the clock must not wrap.
		fuzz_system.now += ((uint64_t)limit->tv_sec % 86400) * SECOND +
				   (uint64_t)limit->tv_nsec;
	}
	return ready;
}

int fuzz_clock_gettime(clockid_t clock, struct timespec *now)
{
	if (!fuzz_system.now)
		return clock_gettime(clock, now);
	fuzz_system.now += TICK;
	now->tv_sec = (time_t)(fuzz_system.now / SECOND);
	now->tv_nsec = (long)(fuzz_system.now % SECOND);
	return 0;
}

int fuzz_ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	void *argument;

	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	return fuzz_system.ioctl ? fuzz_system.ioctl(fd, request, argument)
				 : ioctl(fd, request, argument);
}

ssize_t fuzz_readv(int fd, const struct iovec *iov, int count)
{
	return fuzz_system.readv ? fuzz_system.readv(fd, iov, count) : readv(fd, iov, count);
}

ssize_t fuzz_writev(int fd, const struct iovec *iov, int count)
{
	return fuzz_system.writev ? fuzz_system.writev(fd, iov, count) : writev(fd, iov, count);
}

ssize_t fuzz_write(int fd, const void *data, size_t size)
{
	struct iovec iov = {(void *)data, size};

	return fuzz_system.writev ? fuzz_system.writev(fd, &iov, 1) : write(fd, data, size);
}

long fuzz_syscall(long number, ...)
{
	va_list arguments;
	struct iovec one;
	void *at;
	long size;
	int fd;

	CHECK(number == SYS_read || number == SYS_readv);
	va_start(arguments, number);
	fd = va_arg(arguments, int);
	at = va_arg(arguments, void *);
	size = va_arg(arguments, long); // or a number of vectors
	va_end(arguments);
	if (number == SYS_readv)
		return fuzz_readv(fd, at, (int)size);
	one = (struct iovec){at, (unsigned int)size};
	return fuzz_readv(fd, &one, 1);
}

int fuzz_madvise(void *at, size_t size, int advice)
{
	return fuzz_system.madvise ? fuzz_system.madvise(at, size, advice)
				   : madvise(at, size, advice);
}

int fuzz_failure(const int *errors, unsigned int count)
{
	uint8_t kind = next_byte();

	return kind < 0xE0 ? 0 : errors[kind % count];
}
