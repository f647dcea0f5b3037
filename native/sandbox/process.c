#include "sandbox/sandbox.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int sv_close_range(unsigned int first, unsigned int last)
{
	return syscall(SYS_close_range, first, last, 0) < 0 ? -errno : 0;
}

int sv_clone(unsigned long flags, int *pidfd)
{
	int *tid = NULL;
	long pid;

	// As fork() does: the C library keeps the thread's id where the kernel clears it at the
	// thread's end; the child's must be its own, or its mutexes confuse it with ours.
	flags |= CLONE_PIDFD;
	if (prctl(PR_GET_TID_ADDRESS, &tid) == 0 && tid)
		flags |= CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID;
#if defined(__x86_64__)
	pid = syscall(SYS_clone, flags, NULL, pidfd, tid, 0);
#else
	pid = syscall(SYS_clone, flags, NULL, pidfd, 0, tid);
#endif
	return pid < 0 ? -errno : (int)pid;
}

int sv_die_with_parent(void)
{
	return prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 ? -errno : 0;
}

int sv_set_name(const char *name)
{
	return prctl(PR_SET_NAME, name) < 0 ? -errno : 0;
}

static void *first_steps(void *argument)
{
	// The first heap of a thread makes the C library count processors in /sys. Volatile: the
	// compiler must not see that nothing is done with it.
	void *volatile block = malloc(64);

	free(block);
	*(pid_t *)argument = gettid();
	return NULL;
}

static pthread_t first_thread;
static pid_t first_tid;

int sv_begin_late_parts(void)
{
	// The first thread makes the C library install signal handlers.
	return -pthread_create(&first_thread, NULL, first_steps, &first_tid);
}

int sv_end_late_parts(void)
{
	int ret = pthread_join(first_thread, NULL);

	// A joined thread is still a member of this process for some microseconds, in which
	// unshare(CLONE_NEWUSER) would get EINVAL.
	while (first_tid && syscall(SYS_tgkill, getpid(), first_tid, 0) == 0)
		sched_yield();
	// Opened when a thread is cancelled or ends itself.
	if (!dlopen("libgcc_s.so.1", RTLD_NOW | RTLD_GLOBAL))
		return -ENOENT;
	return -ret;
}
