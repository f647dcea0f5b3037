// How the threads of data planes start.
#pragma once

#include <pthread.h>
#include <signal.h>
#include <stddef.h>

#define SV_THREAD_STACK (256 * 1024)

// A thread with a small stack and signals blocked: they are the main thread's. Those that end the
// process stay: their handler says why (native/sandbox/report.c). 0 or -errno.
static inline int sv_thread_start(pthread_t *thread, void *(*body)(void *), void *argument)
{
	static const int deadly[] = {SIGSYS, SIGABRT, SIGSEGV, SIGBUS, SIGILL, SIGFPE};
	pthread_attr_t attr;
	sigset_t all, old;
	int ret;

	sigfillset(&all);
	for (size_t i = 0; i < sizeof(deadly) / sizeof(*deadly); i++)
		sigdelset(&all, deadly[i]);
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, SV_THREAD_STACK);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	ret = pthread_create(thread, &attr, body, argument);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	pthread_attr_destroy(&attr);
	return -ret;
}
