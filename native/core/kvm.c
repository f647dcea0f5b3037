// System calls of the control path, and the reading of KVM's failure reports.
#include "core/core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int sv_ioctl(int fd, unsigned long request, void *argument)
{
	int ret;

	do
		ret = ioctl(fd, request, argument);
	while (ret < 0 && errno == EINTR);
	return ret < 0 ? -errno : ret;
}

int sv_ioctl_value(int fd, unsigned long request, unsigned long value)
{
	return sv_ioctl(fd, request, (void *)value);
}

struct sv_batch {
	pthread_t thread;
	struct sv_call *calls;
	uint32_t count;
	uint32_t done;
};

static void *run_batch(void *argument)
{
	struct sv_batch *batch = argument;

	for (; batch->done < batch->count; batch->done++) {
		struct sv_call *call = &batch->calls[batch->done];
		int fd = call->fd == SV_FIRST_RESULT ? batch->calls[0].result : call->fd;

		call->result = sv_ioctl(fd, call->request, call->argument);
		if (call->result < 0)
			break;
	}
	return NULL;
}

int sv_batch_start(struct sv_call *calls, uint32_t count, struct sv_batch **out)
{
	struct sv_batch *batch = calloc(1, sizeof(*batch));
	int ret;

	if (!batch)
		return -ENOMEM;
	batch->calls = calls;
	batch->count = count;
	ret = pthread_create(&batch->thread, NULL, run_batch, batch);
	if (ret) {
		free(batch);
		return -ret;
	}
	*out = batch;
	return 0;
}

uint32_t sv_batch_wait(struct sv_batch *batch)
{
	uint32_t done;

	pthread_join(batch->thread, NULL);
	done = batch->done;
	free(batch);
	return done;
}

pid_t sv_thread_id(void)
{
	return (pid_t)syscall(SYS_gettid);
}

// The instruction bytes are valid only if the flag says so: otherwise the words that they
// share hold other data.
static void read_internal_error(const struct kvm_run *run, struct sv_failure *failure)
{
	failure->suberror = run->internal.suberror;
	failure->count = run->internal.ndata < 16 ? run->internal.ndata : 16;
	memcpy(failure->data, run->internal.data, failure->count * sizeof(failure->data[0]));
	if (run->internal.suberror != KVM_INTERNAL_ERROR_EMULATION || failure->count < 4)
		return;
	if (!(run->emulation_failure.flags &
	      KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES))
		return;
	failure->insn_size = run->emulation_failure.insn_size;
	if (failure->insn_size > sizeof(failure->insn))
		failure->insn_size = sizeof(failure->insn);
	memcpy(failure->insn, run->emulation_failure.insn_bytes, failure->insn_size);
}

void sv_vcpu_failure(struct sv_vcpu *vcpu, struct sv_failure *failure)
{
	const struct kvm_run *run = vcpu->run;

	memset(failure, 0, sizeof(*failure));
	failure->reason = run->exit_reason;
	if (run->exit_reason == KVM_EXIT_INTERNAL_ERROR)
		read_internal_error(run, failure);
	if (run->exit_reason == KVM_EXIT_FAIL_ENTRY) {
		failure->hardware_reason = run->fail_entry.hardware_entry_failure_reason;
		failure->cpu = run->fail_entry.cpu;
	}
	if (run->exit_reason == KVM_EXIT_UNKNOWN)
		failure->hardware_reason = run->hw.hardware_exit_reason;
}
