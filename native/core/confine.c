// What a vCPU's thread, and that of huge pages, may do: filters of their own, made from a table
// in a few microseconds, as the first is needed before the first guest instruction (libseccomp
// would cost a millisecond).
#include "core/core.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/kvm.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define OUR_ARCH AUDIT_ARCH_X86_64
#define X32_BIT 0x40000000u
#elif defined(__aarch64__)
#define OUR_ARCH AUDIT_ARCH_AARCH64
#define X32_BIT 0u
#endif

#define THREAD_FLAGS                                                                            \
	(CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM |        \
	 CLONE_SETTLS | CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID)
#define ANY 0, 0, 0 // whatever its arguments are

struct rule {
	unsigned int call;
	unsigned int argument; // its lower half & mask == value
	unsigned int mask;
	unsigned int value;
};

static const struct rule vcpu_calls[] = {
	// The guest, its clock, its interrupts; the most frequent first.
	{SYS_ioctl, 1, 0xFF00, KVMIO << 8},       // KVM_RUN, KVM_IRQ_LINE, registers, irqfds
	{SYS_futex, ANY},                         // the GIL, locks
	{SYS_write, ANY},                         // eventfds, the serial port, the log
	{SYS_read, ANY},                          // eventfds
	{SYS_madvise, ANY},                       // stacks and heaps that are given back
	{SYS_rt_sigprocmask, ANY},                // threads that are started
	{SYS_rt_sigreturn, ANY},                  // the kick's handler
	{SYS_restart_syscall, ANY},               // a wait that a stop signal interrupted
	{SYS_gettid, ANY},                        // who is to be kicked
	{SYS_getpid, ANY},                        // the same
	{SYS_tgkill, ANY},                        // kicks other vCPUs
	{SYS_sched_yield, ANY},                   // locks
	{SYS_clock_gettime, ANY},                 // where a clock can be read by a call only
	{SYS_clock_nanosleep, ANY},               // time limits
	{SYS_timerfd_settime, ANY},               // the serial port's timer
	// Handlers of exits: vhost-user messages, eventfds, the nursery, sockets of chardevs.
	{SYS_sendmsg, ANY},                       // requests to back ends
	{SYS_recvmsg, ANY},                       // their answers
	{SYS_sendto, ANY},                        // chardevs
	{SYS_recvfrom, ANY},                      // the rest of an answer
	{SYS_poll, ANY},                          // waits with a time limit
	{SYS_ppoll, ANY},                         // the same
	{SYS_epoll_ctl, ANY},                     // the main loop watches another descriptor
	{SYS_writev, ANY},                        // the log
	{SYS_pwrite64, ANY},                      // statistics pages
	{SYS_pread64, ANY},                       // the same
	{SYS_close, ANY},                         // descriptors that were handed over
	{SYS_dup, ANY},                           // copies to hand over
	{SYS_dup3, ANY},                          // the same
	{SYS_fcntl, ANY},                         // the same; locks of images
	{SYS_ioctl, 1, ~0u, FIONBIO},             // descriptors that must not block
	// DRIVER_OK and the reset of a device that the kernel serves (vmm/devices/vhost_kernel.py).
	// To hand them to the main thread would have it wait for the kernel's thread, which holds
	// a ring's lock while it copies guest memory; a thread that is started here has this list
	// as well. Neither VHOST_SET_OWNER is here, without which a descriptor can do nothing, nor
	// a CID or a memory table: whoever takes a vCPU's thread over can start and stop what this
	// VM was given, and make no other device of a /dev/vhost-* that he opens.
	{SYS_ioctl, 1, ~0u, VHOST_SET_FEATURES},      // what the driver took
	{SYS_ioctl, 1, ~0u, VHOST_SET_VRING_NUM},     // its rings
	{SYS_ioctl, 1, ~0u, VHOST_SET_VRING_BASE},    // the same
	{SYS_ioctl, 1, ~0u, VHOST_SET_VRING_ADDR},    // the same
	{SYS_ioctl, 1, ~0u, VHOST_SET_VRING_KICK},    // their doorbells
	{SYS_ioctl, 1, ~0u, VHOST_SET_VRING_CALL},    // their interrupts
	{SYS_ioctl, 1, ~0u, VHOST_VSOCK_SET_RUNNING}, // start and stop
	{SYS_eventfd2, ANY},                      // kicks and calls
	{SYS_socketpair, ANY},                    // connections to workers
	{SYS_getsockname, ANY},                   // what Python asks of a socket that it takes over
	{SYS_getsockopt, ANY},                    // the same
	{SYS_shutdown, ANY},                      // connections that are given up
	{SYS_memfd_create, ANY},                  // pages that are shared with a worker
	{SYS_ftruncate, ANY},                     // their size
	{SYS_fstat, ANY},                         // the same
	{SYS_lseek, ANY},                         // the size of an image
	// Python modules that are imported when an exit needs them: files to read, no other ones.
	{SYS_openat, 2, O_ACCMODE | O_CREAT | O_TRUNC | O_APPEND, O_RDONLY},
	{SYS_newfstatat, ANY},                    // where is the module?
	{SYS_getdents64, ANY},                    // the same
	// Memory: never executable.
	{SYS_mmap, 2, PROT_EXEC, 0},              // heap, stacks, shared pages
	{SYS_mprotect, 2, PROT_EXEC, 0},          // heap, guard pages
	{SYS_munmap, ANY},                        // heap, stacks
	{SYS_mremap, ANY},                        // heap
	{SYS_brk, ANY},                           // heap
	{SYS_getrandom, ANY},                     // hashes
	// Threads that do what would take too long here.
	{SYS_clone, 0, ~0u, THREAD_FLAGS},        // no process
	{SYS_set_robust_list, ANY},               // their start
	{SYS_rseq, ANY},                          // the same
	{SYS_sigaltstack, ANY},                   // the same
	{SYS_sched_getaffinity, ANY},             // how many make sense
	{SYS_exit, ANY},                          // their end
	{SYS_exit_group, ANY},                    // a defect of ours ends the process
};

// huge.c: nothing but memory that is mapped already.
static const struct rule huge_calls[] = {
	{SYS_futex, ANY},                         // its waits
	{SYS_clock_gettime, ANY},                 // where a clock can be read by a call only
	{SYS_restart_syscall, ANY},               // a wait that a stop signal interrupted
	{SYS_fstat, ANY},                         // how much RAM is there
	{SYS_newfstatat, ANY},                    // the same, as newer C libraries ask
	{SYS_lseek, ANY},                         // where
	{SYS_madvise, ANY},                       // make it huge; its stack is given back
	{SYS_rt_sigprocmask, ANY},                // its end
	{SYS_munmap, ANY},                        // the same
	{SYS_exit, ANY},                          // the same
	{SYS_exit_group, ANY},                    // a defect of ours ends the process
};

#define COUNT(rules) (sizeof(rules) / sizeof(*(rules)))
#define MAX_CODE (COUNT(vcpu_calls) * 6 + 12)

struct code {
	struct sock_filter list[MAX_CODE];
	unsigned short length;
};

static void put(struct code *code, unsigned short op, unsigned int k, unsigned char yes,
		unsigned char no)
{
	code->list[code->length++] = (struct sock_filter){op, yes, no, k};
}

static void load(struct code *code, size_t offset)
{
	put(code, BPF_LD | BPF_W | BPF_ABS, (unsigned int)offset, 0, 0);
}

static void make_code(struct code *code, const struct rule *rules, size_t count)
{
	const unsigned int equal = BPF_JMP | BPF_JEQ | BPF_K;

	code->length = 0;
	load(code, offsetof(struct seccomp_data, arch));
	put(code, equal, OUR_ARCH, 1, 0);
	put(code, BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS, 0, 0);
	load(code, offsetof(struct seccomp_data, nr));
	if (X32_BIT) {
		put(code, BPF_JMP | BPF_JGE | BPF_K, X32_BIT, 0, 1);
		put(code, BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS, 0, 0);
	}
	// Its flags lie in memory, where they can't be checked: the C library then calls clone.
	put(code, equal, SYS_clone3, 0, 1);
	put(code, BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS, 0, 0);
	for (size_t i = 0; i < count; i++) {
		const struct rule *rule = &rules[i];

		if (!rule->mask) {
			put(code, equal, rule->call, 0, 1);
			put(code, BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
			continue;
		}
		put(code, equal, rule->call, 0, 5);
		// The machines that we run on are little-endian.
		load(code, offsetof(struct seccomp_data, args) + 8 * rule->argument);
		put(code, BPF_ALU | BPF_AND | BPF_K, rule->mask, 0, 0);
		put(code, equal, rule->value, 0, 1);
		put(code, BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
		load(code, offsetof(struct seccomp_data, nr));
	}
	put(code, BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM, 0, 0);
}

static int drop_capabilities(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct none[2];

	memset(none, 0, sizeof(none));
	return syscall(SYS_capset, &header, none) < 0 ? -errno : 0;
}

static int confine(bool capabilities, bool calls, const struct rule *rules, size_t count)
{
	struct code code;
	struct sock_fprog program = {.filter = code.list};
	int ret;

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		return -errno;
	if (capabilities) {
		ret = drop_capabilities();
		if (ret < 0)
			return ret;
	}
	if (!calls)
		return 0;
	make_code(&code, rules, count);
	program.len = code.length;
	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) < 0 ? -errno : 0;
}

int sv_vcpu_confine(bool capabilities, bool calls)
{
	return confine(capabilities, calls, vcpu_calls, COUNT(vcpu_calls));
}

int sv_huge_confine(bool capabilities, bool calls)
{
	return confine(capabilities, calls, huge_calls, COUNT(huge_calls));
}
