// System calls for processes and sandboxes that Python's standard library lacks.
#pragma once

int sv_close_range(unsigned int first, unsigned int last);

// Clone this single-threaded process: the child's parent is ours (CLONE_PARENT), which is
// told of its end by the pidfd alone (exit signal 0, to be waited for with __WALL).
// Returns the child's pid with *pidfd set, 0 in the child, or a negative errno.
int sv_clone_sibling(int *pidfd);

// Be killed by SIGKILL when the thread that is our parent ends.
int sv_die_with_parent(void);

// No system call gives this process more rights from now on.
int sv_no_new_privs(void);

// The name that ps and top show for this thread, cut to 15 bytes.
int sv_set_name(const char *name);
