// System calls for processes and sandboxes that Python's standard library lacks.
//
// Everything that confines the caller holds for the calling thread, so a process confines
// itself while it has one; what can't be undone is said so.
#pragma once

// Where the constants come from that policies name (native/decl/sandbox.h lists them).
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// ---- process.c -----------------------------------------------------------------------------

int sv_close_range(unsigned int first, unsigned int last);

// Clone this single-threaded process, with CLONE_PARENT and CLONE_NEW* as `flags` say. Its end
// is told by the pidfd alone (exit signal 0, to be waited for with __WALL).
// Returns the child's pid with *pidfd set, 0 in the child, or a negative errno.
int sv_clone(unsigned long flags, int *pidfd);

// Be killed by SIGKILL when the thread that is our parent ends. A change of the user's
// identity undoes it.
int sv_die_with_parent(void);

// The name that ps and top show for this thread, cut to 15 bytes.
int sv_set_name(const char *name);

// What the C library would otherwise do later, in a process that may not any more: it opens
// a library and installs signal handlers. In between there is a second thread.
int sv_begin_late_parts(void);
int sv_end_late_parts(void);

// ---- namespaces.c --------------------------------------------------------------------------

int sv_unshare(unsigned long flags);

// A user namespace with these maps (lines as in /proc/PID/uid_map). `keep_groups`: whether
// setgroups() stays allowed, for which the caller must be privileged outside.
int sv_enter_user_namespace(const char *uid_map, const char *gid_map, bool keep_groups);

// In a mount namespace of its own: an empty, read-only root directory instead of all mounts.
int sv_empty_root(void);

// ---- privileges.c --------------------------------------------------------------------------

// Be this user and group alone.
int sv_become(unsigned int uid, unsigned int gid);
// Capabilities outlive sv_become, until a user namespace is entered.
int sv_keep_capabilities_over_become(void);

// Only capabilities of `keep` (bits) stay, in every set; no execve or change of identity gives
// more. With CAP_SETPCAP the bounding set is lowered and the secure bits are locked.
int sv_limit_capabilities(uint64_t keep);

// No system call gives this process more rights from now on.
int sv_no_new_privs(void);

// No core dumps, no ptrace by others of the same user.
int sv_no_dumps(void);

// Lower a limit (RLIMIT_*), soft and hard, to `value`, if it isn't lower already.
int sv_limit(int resource, uint64_t value);

// ---- landlock.c ----------------------------------------------------------------------------

int sv_landlock_abi(void);
// Every right that this kernel's Landlock knows is refused. Returns the ABI's number.
int sv_landlock_deny_all(void);

// ---- rings.c -------------------------------------------------------------------------------

// Whether io_uring can be had here, with rings that can be restricted: 0 or a negative errno.
int sv_try_restricted_ring(void);

// ---- filter.c ------------------------------------------------------------------------------

struct sv_policy;

enum sv_refusal {
	SV_REFUSE_TRAP,    // SIGSYS: see sv_report_deaths
	SV_REFUSE_ERROR,   // EPERM
	SV_REFUSE_LOG,     // allowed, and told to the kernel's log
	SV_REFUSE_NOTHING, // allowed: only rules with an error forbid something
};

// `argument & mask` == `value`
struct sv_condition {
	unsigned int argument;
	uint64_t mask;
	uint64_t value;
};

// A list of what is allowed; the rest is refused. NULL: no memory.
struct sv_policy *sv_policy_create(enum sv_refusal refusal);
void sv_policy_destroy(struct sv_policy *policy);
// One rule; all conditions must hold. `error`: the errno to answer with, 0: allow.
// -ENOSYS: no system call has that name.
int sv_policy_rule(struct sv_policy *policy, const char *name, unsigned int error,
		   const struct sv_condition *conditions, unsigned int count);
// The filter as the kernel takes it; returns its bytes. -E2BIG: `size` is too small.
int sv_policy_export(struct sv_policy *policy, uint8_t *program, size_t size);

// For the calling thread and what it starts; for good.
int sv_filter_install(const uint8_t *program, size_t size);

int sv_system_call_number(const char *name);
int sv_system_call_name(int number, char *name, size_t size);

// ---- report.c ------------------------------------------------------------------------------

// Tell `fd` about signals that end this process (SIGSYS by a filter, SIGABRT, SIGSEGV, SIGBUS,
// SIGILL, SIGFPE), then exit with 128 + the signal's number. `text`: a line for people, else a
// control message {"type": "died", "signal", "call", "address"}.
int sv_report_deaths(int fd, bool text);
