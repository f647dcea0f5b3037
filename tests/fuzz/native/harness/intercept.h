// Included before every file of a data plane under test: what it asks of the system and of
// native/virtq goes through the harness, which passes it on, answers in its place, or refuses.
// So threads are run when and as long as the input says, and time passes as it says.
#pragma once

#include <poll.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "virtq/virtq.h"

int fuzz_virtq_start(struct sv_virtq *vq, const struct sv_memory *memory, unsigned int size,
		     uint64_t desc, uint64_t avail, uint64_t used, uint64_t features,
		     uint16_t base, struct sv_inflight_queue *inflight);
int fuzz_virtq_pop(struct sv_virtq *vq, struct sv_chain *chain);
void fuzz_virtq_unpop(struct sv_virtq *vq, uint16_t head);
void fuzz_virtq_push(struct sv_virtq *vq, uint16_t head, uint32_t written);
int fuzz_thread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *),
		       void *argument);
int fuzz_thread_join(pthread_t thread, void **result);
int fuzz_cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex);
int fuzz_ppoll(struct pollfd *fds, nfds_t count, const struct timespec *limit,
	       const sigset_t *mask);
int fuzz_clock_gettime(clockid_t clock, struct timespec *now);
int fuzz_ioctl(int fd, unsigned long request, ...);
ssize_t fuzz_readv(int fd, const struct iovec *iov, int count);
ssize_t fuzz_writev(int fd, const struct iovec *iov, int count);
ssize_t fuzz_write(int fd, const void *data, size_t size);
long fuzz_syscall(long number, ...);
int fuzz_madvise(void *at, size_t size, int advice);

#define sv_virtq_start fuzz_virtq_start
#define sv_virtq_pop fuzz_virtq_pop
#define sv_virtq_unpop fuzz_virtq_unpop
#define sv_virtq_push fuzz_virtq_push
#define pthread_create fuzz_thread_create
#define pthread_join fuzz_thread_join
#define pthread_cond_wait fuzz_cond_wait
#define ppoll fuzz_ppoll
#define clock_gettime fuzz_clock_gettime
#define ioctl fuzz_ioctl
#define readv fuzz_readv
#define writev fuzz_writev
#define write fuzz_write
#define syscall fuzz_syscall
#define madvise fuzz_madvise
