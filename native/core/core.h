// The core's native part: KVM run loop, devices on the hot path, guest memory.
//
// Functions return 0 or a positive value on success and a negative errno on failure.
#pragma once

#include <linux/kvm.h>
#include <linux/vhost.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "core/uart.h"
#include "core/virtio.h"

// Why sv_vcpu_run() came back; the same numbers as EXIT_* in vmm/hypervisor/interface.py.
#define SV_EXIT_IO_READ 1
#define SV_EXIT_IO_WRITE 2
#define SV_EXIT_MMIO_READ 3
#define SV_EXIT_MMIO_WRITE 4
#define SV_EXIT_KICKED 5
#define SV_EXIT_SHUTDOWN 6
#define SV_EXIT_RESET 7
#define SV_EXIT_POWEROFF 8
#define SV_EXIT_INTERNAL_ERROR 9
#define SV_EXIT_UNKNOWN 10

// ---- machine.c: what all vCPUs of a VM serve in C --------------------------------------------

// ACPI 6.4, 4.8.3.7: SLP_TYP of S5 in our DSDT; 4.8.3.6: RESET_VALUE in our FADT.
#define SV_SLEEP_TYPE_S5 5
#define SV_RESET_VALUE 1
#define SV_POWER_REGISTERS 3
// A power of two, so that neighbours never share a place in the table.
#define SV_MAX_VIRTIO 64

struct sv_machine;

int sv_machine_create(struct sv_machine **machine);
void sv_machine_destroy(struct sv_machine *machine);
// Serve the UART at `port`, which must outlive the machine. Before the first vCPU runs.
int sv_machine_add_uart(struct sv_machine *machine, uint16_t port, struct sv_uart *uart);
int sv_machine_add_power(struct sv_machine *machine, uint64_t base);
// Serve the virtio-mmio slot at `base`; any time. The machine takes a reference of its own.
int sv_machine_add_virtio(struct sv_machine *machine, uint64_t base, struct sv_virtio *device);
// What waits on the vCPUs' threads: nothing; accesses that C can't serve, which are then looked at
// anew, so that the guest may run while its devices are still being made; the guest.
#define SV_HOLD_NOTHING 0
#define SV_HOLD_ACCESSES 1
#define SV_HOLD_GUEST 2
void sv_machine_hold(struct sv_machine *machine, int what);
// Until a vCPU goes on that SV_HOLD_GUEST kept from the guest; `ns` nanoseconds at most.
void sv_machine_wait_entered(struct sv_machine *machine, uint64_t ns);
// For the vCPUs: wait while `what` is held; whether there was a wait.
bool sv_machine_await(struct sv_machine *machine, int what);
// Let Python serve ports that C would answer as absent.
int sv_machine_forward_ports(struct sv_machine *machine, uint32_t port, uint32_t count);

// Result of the two below: an SV_EXIT_* that ends the run, or one of these.
#define SV_SERVED 0
#define SV_FORWARD (-1)
int sv_machine_port(struct sv_machine *machine, uint16_t port, uint32_t size, bool write,
		    uint8_t *data);
int sv_machine_mmio(struct sv_machine *machine, uint64_t address, uint32_t size, bool write,
		    uint8_t *data);

// ---- rtc.c ------------------------------------------------------------------------------------

uint8_t sv_rtc_read(uint8_t index);

// ---- vcpu.c: the run loop ---------------------------------------------------------------------

struct sv_vcpu {
	// Of the last exit that was forwarded.
	uint64_t exit_address;
	uint64_t exit_value;
	uint32_t exit_size;
	int run_errno;     // errno of a failed KVM_RUN, else 0
	int fd;
	struct kvm_run *run;
	// Counters; written by the vCPU's thread alone.
	uint64_t served;    // exits answered in C
	uint64_t forwarded; // exits handed to Python
	uint64_t kicks;     // runs ended by a kick

	size_t run_size;
	struct sv_machine *machine;
	uint8_t *read_data;  // where the answer of a forwarded read goes
	uint32_t io_next;    // next item of a port access, of io_count
	uint32_t io_count;
	_Atomic int kicked;
	_Atomic int in_run;
	pthread_mutex_t kick_lock; // guards tid
	sigset_t outer_mask; // what the thread blocked before it was this vCPU's
	pid_t tid;
};

int sv_vcpu_create(int vm_fd, uint32_t index, int run_size, struct sv_machine *machine,
		   struct sv_vcpu **vcpu);
// -EBUSY while a thread is bound.
int sv_vcpu_destroy(struct sv_vcpu *vcpu);
// On the vCPU's own thread: before its first run, and after its last. In between all signals
// but its own are blocked.
int sv_vcpu_bind(struct sv_vcpu *vcpu);
void sv_vcpu_unbind(struct sv_vcpu *vcpu);

// Confine the calling thread, a vCPU's, for good: no new privileges, no `capabilities`, only the
// system `calls` that confine.c lists (EPERM for others), if asked for.
int sv_vcpu_confine(bool capabilities, bool calls);
// The same for the thread of huge.c, which needs much less.
int sv_huge_confine(bool capabilities, bool calls);
// Run until an exit that C can't serve or a kick; returns SV_EXIT_*.
int sv_vcpu_run(struct sv_vcpu *vcpu);
// Finish the access of the last exit without running the guest: SV_EXIT_KICKED when done, else
// the next item of a string or split access.
int sv_vcpu_finish(struct sv_vcpu *vcpu);
void sv_vcpu_complete_read(struct sv_vcpu *vcpu, uint64_t value);
// Any thread. A kick makes the current or else the next run end with SV_EXIT_KICKED.
void sv_vcpu_kick(struct sv_vcpu *vcpu);

// ---- kvm.c --------------------------------------------------------------------------------------

int sv_ioctl(int fd, unsigned long request, void *argument);
int sv_ioctl_value(int fd, unsigned long request, unsigned long value);

// ioctls one after the other on a thread of their own, up to the first that fails. The calls
// are the thread's until sv_batch_wait().
#define SV_FIRST_RESULT (-1) // as fd: what the first call returned
struct sv_call {
	int fd;
	int result; // not below 0, or a negative errno
	unsigned long request;
	void *argument;
};
struct sv_batch;
int sv_batch_start(struct sv_call *calls, uint32_t count, struct sv_batch **batch);
// Wait for the thread and free it; returns how many calls succeeded.
uint32_t sv_batch_wait(struct sv_batch *batch);
pid_t sv_thread_id(void);

// What KVM said about an internal error or a failed entry, out of the unions of kvm_run.
struct sv_failure {
	uint32_t reason;    // KVM_EXIT_*
	uint32_t suberror;
	uint32_t count;     // valid words in data
	uint64_t data[16];
	uint32_t insn_size; // valid bytes in insn, only if KVM says that they are
	uint8_t insn[15];
	uint64_t hardware_reason;
	uint32_t cpu;
};
void sv_vcpu_failure(struct sv_vcpu *vcpu, struct sv_failure *failure);

// ---- memory.c -----------------------------------------------------------------------------------

#define SV_HUGE_PAGE (2ul << 20)

// A sealed memfd of `size` bytes (SHRINK, GROW, SEAL: holes can still be punched), of huge pages
// of that size if it isn't 0.
int sv_memory_memfd(const char *name, uint64_t size, uint64_t huge_page_size);
// Take the file for this VM alone: -EWOULDBLOCK if another one has it.
int sv_memory_lock(int fd);
// Page size of the file system of `fd`: the huge page size on hugetlbfs.
int64_t sv_memory_page_size(int fd);
// Map the whole file, 2 MiB aligned, between guard pages. The reservation is what to unmap.
struct sv_mapping {
	uint64_t address;
	uint64_t size;
	uint64_t reserved_address;
	uint64_t reserved_size;
};
int sv_memory_map(int fd, uint64_t size, uint64_t page_size, int dump, struct sv_mapping *mapping);
void sv_memory_unmap(struct sv_mapping *mapping);
int sv_memory_populate(struct sv_mapping *mapping, uint64_t page_size, uint32_t threads);

// ---- huge.c -------------------------------------------------------------------------------------

// Whether the host's administrator wants huge pages at all.
bool sv_huge_is_wanted(void);
// Huge pages for [start, end) of shared memory, whose ends are multiples of theirs, whatever the
// host's shmem_enabled says (it is about those that nobody asked for). MADV_COLLAPSE takes an
// extent without a single page for a hole, and Linux 6.1 stops at one that nobody has mapped: so
// each gets one page first, by a call that can fail where a touch would kill.
bool sv_huge_collapse(uint64_t start, uint64_t end);

// Where the guest will soon use RAM: `count` huge pages from the one at `offset` on, upwards or
// downwards.
#define SV_MAX_AHEAD 4
struct sv_ahead {
	uint64_t offset; // in the memfd
	uint32_t count;
	bool down;
};
// From now on have RAM, a memfd of base pages, in huge pages where the guest uses it, or soon
// will, once it uses `least` bytes. The thread confines itself as sv_vcpu_confine() says.
struct sv_huge;
int sv_huge_start(int fd, const struct sv_mapping *mapping, uint64_t least,
		  const struct sv_ahead *ahead, uint32_t ahead_count, bool capabilities, bool calls,
		  struct sv_huge **huge);
// While held nothing becomes huge. Any thread; does not wait for the one that is being made.
void sv_huge_hold(struct sv_huge *huge, bool held);
// How many were made.
uint64_t sv_huge_made(struct sv_huge *huge);
// End the thread and free it; before RAM is unmapped. NULL is none.
void sv_huge_stop(struct sv_huge *huge);

// ---- load.c -------------------------------------------------------------------------------------

// `length` bytes at `offset` of `fd` go to `address`, in the mapping; so many zeroes follow.
struct sv_piece {
	int fd;
	uint64_t offset;
	uint64_t length;
	uint64_t zeroes;
	uint64_t address;
};
struct sv_load;
// Load the pieces on a thread of their own, or two; when one fails, the others may be loaded or not.
// `page_size` and the mapping are those of `memory_fd`; one load at a time.
int sv_load_start(int memory_fd, uint64_t page_size, const struct sv_mapping *mapping,
		  const struct sv_piece *pieces, uint32_t count, struct sv_load **load);
// Help the thread, wait for it and free it: 0, or why *failed can't be loaded; -ENODATA: the file
// ends before it has `length` bytes.
int sv_load_wait(struct sv_load *load, uint32_t *failed);
