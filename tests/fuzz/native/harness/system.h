// The system as a data plane under test finds it (intercept.h). What is NULL is the real thing.
#pragma once

#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/uio.h>
#include <time.h>

struct fuzz_system {
	int (*create)(void *(*run)(void *), void *argument);
	void (*join)(void);
	void (*cond_wait)(pthread_mutex_t *mutex); // returns when what is waited for holds
	int (*ppoll)(struct pollfd *fds, nfds_t count, const struct timespec *limit);
	// These return -1 with errno, as what they stand for does.
	int (*ioctl)(int fd, unsigned long request, void *argument);
	ssize_t (*readv)(int fd, const struct iovec *iov, int count);
	ssize_t (*writev)(int fd, const struct iovec *iov, int count);
	int (*madvise)(void *at, size_t size, int advice);
	uint64_t now; // ns; 0: the clock's
};

extern struct fuzz_system fuzz_system;

// Poll without waiting. What a wait would have taken is added to `now`.
int fuzz_look(struct pollfd *fds, nfds_t count, const struct timespec *limit);

// Errors that the tape may let a call fail with; 0: it is not to fail.
int fuzz_failure(const int *errors, unsigned int count);
