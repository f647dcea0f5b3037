// The run loop of one vCPU, and the kick that ends it from any thread.
#include "core/core.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

// A standard signal: a queued real-time signal can fail when its queue is full.
#define KICK_SIGNAL SIGUSR1

// Initial-exec, because the lazy allocation of other models must not happen in a handler.
static __thread struct sv_vcpu *bound __attribute__((tls_model("initial-exec")));

static void on_kick(int number)
{
	if (bound)
		*(volatile uint8_t *)&bound->run->immediate_exit = 1;
}

int sv_vcpu_create(int vm_fd, uint32_t index, int run_size, struct sv_machine *machine,
		   struct sv_vcpu **out)
{
	struct sv_vcpu *vcpu = calloc(1, sizeof(*vcpu));
	int ret;

	if (!vcpu)
		return -ENOMEM;
	vcpu->fd = ioctl(vm_fd, KVM_CREATE_VCPU, (unsigned long)index);
	if (vcpu->fd < 0) {
		ret = -errno;
		goto fail;
	}
	vcpu->run_size = (size_t)run_size;
	vcpu->run = mmap(NULL, vcpu->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
	if (vcpu->run == MAP_FAILED) {
		ret = -errno;
		close(vcpu->fd);
		goto fail;
	}
	vcpu->machine = machine;
	pthread_mutex_init(&vcpu->kick_lock, NULL);
	*out = vcpu;
	return 0;
fail:
	free(vcpu);
	return ret;
}

int sv_vcpu_destroy(struct sv_vcpu *vcpu)
{
	if (!vcpu)
		return 0;
	if (vcpu->tid)
		return -EBUSY; // its thread may be inside: better to leave it than to pull it away
	munmap(vcpu->run, vcpu->run_size);
	close(vcpu->fd);
	pthread_mutex_destroy(&vcpu->kick_lock);
	free(vcpu);
	return 0;
}

int sv_vcpu_bind(struct sv_vcpu *vcpu)
{
	struct sigaction action = {.sa_handler = on_kick, .sa_flags = SA_RESTART};
	sigset_t mask;
	int ret;

	// Everything that isn't about this thread itself belongs to the main thread.
	sigfillset(&mask);
	sigdelset(&mask, KICK_SIGNAL);
	sigdelset(&mask, SIGSEGV);
	sigdelset(&mask, SIGBUS);
	sigdelset(&mask, SIGFPE);
	sigdelset(&mask, SIGILL);
	sigdelset(&mask, SIGABRT);
	sigdelset(&mask, SIGSYS);
	sigdelset(&mask, SIGTRAP);
	if (sigaction(KICK_SIGNAL, &action, NULL) < 0)
		return -errno;
	ret = pthread_sigmask(SIG_SETMASK, &mask, &vcpu->outer_mask);
	if (ret)
		return -ret;
	bound = vcpu;
	pthread_mutex_lock(&vcpu->kick_lock);
	vcpu->tid = (pid_t)syscall(SYS_gettid);
	pthread_mutex_unlock(&vcpu->kick_lock);
	return 0;
}

void sv_vcpu_unbind(struct sv_vcpu *vcpu)
{
	// Under the lock, so that no kick goes to a thread that ended.
	pthread_mutex_lock(&vcpu->kick_lock);
	vcpu->tid = 0;
	pthread_mutex_unlock(&vcpu->kick_lock);
	bound = NULL;
	pthread_sigmask(SIG_SETMASK, &vcpu->outer_mask, NULL);
}

// No kick is lost: `kicked` is set before the signal is sent, and the loop, before it enters
// KVM, first clears immediate_exit and then looks at `kicked`. A kick after that look sees
// in_run and sends the signal, whose handler sets immediate_exit on this very thread: either
// before the system call, which then returns at once, or the signal interrupts it.
void sv_vcpu_kick(struct sv_vcpu *vcpu)
{
	if (atomic_exchange(&vcpu->kicked, 1))
		return;
	pthread_mutex_lock(&vcpu->kick_lock);
	if (vcpu->tid && atomic_load(&vcpu->in_run))
		syscall(SYS_tgkill, getpid(), vcpu->tid, KICK_SIGNAL);
	pthread_mutex_unlock(&vcpu->kick_lock);
}

static int forward(struct sv_vcpu *vcpu, int kind, uint64_t address, uint32_t size,
		   uint8_t *data)
{
	bool write = kind == SV_EXIT_IO_WRITE || kind == SV_EXIT_MMIO_WRITE;

	vcpu->exit_address = address;
	vcpu->exit_size = size;
	vcpu->exit_value = 0;
	if (write)
		memcpy(&vcpu->exit_value, data, size);
	vcpu->read_data = write ? NULL : data;
	vcpu->forwarded++;
	return kind;
}

// The items of a port access, one by one: a string instruction comes as one exit with several.
static int serve_ports(struct sv_vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;
	uint32_t size = run->io.size;
	bool write = run->io.direction == KVM_EXIT_IO_OUT;

	while (vcpu->io_next < vcpu->io_count) {
		uint8_t *data = (uint8_t *)run + run->io.data_offset +
				(size_t)vcpu->io_next++ * size;
		int ret = sv_machine_port(vcpu->machine, run->io.port, size, write, data);

		if (ret == SV_FORWARD && sv_machine_await(vcpu->machine, SV_HOLD_ACCESSES))
			ret = sv_machine_port(vcpu->machine, run->io.port, size, write, data);
		if (ret == SV_FORWARD)
			return forward(vcpu, write ? SV_EXIT_IO_WRITE : SV_EXIT_IO_READ,
				       run->io.port, size, data);
		vcpu->served++;
		if (ret != SV_SERVED) {
			vcpu->io_next = vcpu->io_count;
			return ret;
		}
	}
	return 0;
}

static int serve_mmio(struct sv_vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;
	bool write = run->mmio.is_write;
	int ret;

	if (run->mmio.len > sizeof(run->mmio.data))
		return SV_EXIT_UNKNOWN;
	ret = sv_machine_mmio(vcpu->machine, run->mmio.phys_addr, run->mmio.len, write,
			      run->mmio.data);
	if (ret == SV_FORWARD && sv_machine_await(vcpu->machine, SV_HOLD_ACCESSES))
		ret = sv_machine_mmio(vcpu->machine, run->mmio.phys_addr, run->mmio.len, write,
				      run->mmio.data);
	if (ret == SV_FORWARD)
		return forward(vcpu, write ? SV_EXIT_MMIO_WRITE : SV_EXIT_MMIO_READ,
			       run->mmio.phys_addr, run->mmio.len, run->mmio.data);
	vcpu->served++;
	return ret;
}

static int serve_system_event(const struct kvm_run *run)
{
	switch (run->system_event.type) {
	case KVM_SYSTEM_EVENT_SHUTDOWN: return SV_EXIT_POWEROFF;
	case KVM_SYSTEM_EVENT_RESET: return SV_EXIT_RESET;
	case KVM_SYSTEM_EVENT_CRASH: return SV_EXIT_SHUTDOWN;
	default: return SV_EXIT_UNKNOWN;
	}
}

// 0: go on running.
static int serve_exit(struct sv_vcpu *vcpu)
{
	switch (vcpu->run->exit_reason) {
	case KVM_EXIT_IO:
		if (vcpu->run->io.size > 4)
			return SV_EXIT_UNKNOWN;
		vcpu->io_next = 0;
		vcpu->io_count = vcpu->run->io.count;
		return serve_ports(vcpu);
	case KVM_EXIT_MMIO: return serve_mmio(vcpu);
	case KVM_EXIT_INTR:
	case KVM_EXIT_IRQ_WINDOW_OPEN: return 0;
	case KVM_EXIT_SHUTDOWN: return SV_EXIT_SHUTDOWN;
	case KVM_EXIT_SYSTEM_EVENT: return serve_system_event(vcpu->run);
	case KVM_EXIT_INTERNAL_ERROR:
	case KVM_EXIT_FAIL_ENTRY: return SV_EXIT_INTERNAL_ERROR;
	default: return SV_EXIT_UNKNOWN;
	}
}

static int enter(struct sv_vcpu *vcpu, bool finish)
{
	volatile uint8_t *immediate_exit = &vcpu->run->immediate_exit;
	int ret;

	atomic_store(&vcpu->in_run, 1);
	*immediate_exit = 0;
	atomic_signal_fence(memory_order_seq_cst);
	if (finish || atomic_load(&vcpu->kicked))
		*immediate_exit = 1;
	ret = ioctl(vcpu->fd, KVM_RUN, 0) < 0 ? -errno : 0;
	atomic_store(&vcpu->in_run, 0);
	return ret;
}

static int run_loop(struct sv_vcpu *vcpu, bool finish)
{
	vcpu->run_errno = 0;
	vcpu->read_data = NULL;
	for (;;) {
		int ret = serve_ports(vcpu);

		if (ret)
			return ret;
		if (!finish)
			sv_machine_await(vcpu->machine, SV_HOLD_GUEST);
		ret = enter(vcpu, finish);
		if (!ret) {
			ret = serve_exit(vcpu);
			if (ret)
				return ret;
			continue;
		}
		// EAGAIN: an application processor got its start-up IPI.
		if (ret != -EINTR && ret != -EAGAIN) {
			vcpu->run_errno = -ret;
			return SV_EXIT_INTERNAL_ERROR;
		}
		if (finish && ret == -EINTR)
			return SV_EXIT_KICKED;
		if (!finish && atomic_exchange(&vcpu->kicked, 0)) {
			vcpu->kicks++;
			return SV_EXIT_KICKED;
		}
	}
}

int sv_vcpu_run(struct sv_vcpu *vcpu)
{
	return run_loop(vcpu, false);
}

int sv_vcpu_finish(struct sv_vcpu *vcpu)
{
	return run_loop(vcpu, true);
}

void sv_vcpu_complete_read(struct sv_vcpu *vcpu, uint64_t value)
{
	if (vcpu->read_data)
		memcpy(vcpu->read_data, &value, vcpu->exit_size);
	vcpu->read_data = NULL;
}
