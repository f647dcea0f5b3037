#include "sandbox/sandbox.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int sv_close_range(unsigned int first, unsigned int last)
{
	return syscall(SYS_close_range, first, last, 0) < 0 ? -errno : 0;
}

int sv_clone_sibling(int *pidfd)
{
	unsigned long flags = CLONE_PARENT | CLONE_PIDFD;
	int *tid = NULL;
	long pid;

	// As fork() does: the C library keeps the thread's id where the kernel clears it at the
	// thread's end; the child's must be its own, or its mutexes confuse it with ours.
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

int sv_no_new_privs(void)
{
	return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ? -errno : 0;
}

int sv_set_name(const char *name)
{
	return prctl(PR_SET_NAME, name) < 0 ? -errno : 0;
}
