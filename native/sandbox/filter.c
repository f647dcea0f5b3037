#include "sandbox/sandbox.h"

#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <seccomp.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAX_CONDITIONS 6 // a system call has no more arguments

struct sv_policy {
	scmp_filter_ctx context;
};

struct sv_policy *sv_policy_create(enum sv_refusal refusal)
{
	struct sv_policy *policy = malloc(sizeof(*policy));
	uint32_t action = refusal == SV_REFUSE_TRAP ? SCMP_ACT_TRAP :
			  refusal == SV_REFUSE_LOG ? SCMP_ACT_LOG :
			  refusal == SV_REFUSE_NOTHING ? SCMP_ACT_ALLOW : SCMP_ACT_ERRNO(EPERM);

	if (!policy)
		return NULL;
	policy->context = seccomp_init(action);
	if (!policy->context) {
		free(policy);
		return NULL;
	}
	// Calls through another ABI (32 bits, x32) have other numbers: no list of ours names them.
	seccomp_attr_set(policy->context, SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_KILL_PROCESS);
	return policy;
}

void sv_policy_destroy(struct sv_policy *policy)
{
	seccomp_release(policy->context);
	free(policy);
}

int sv_policy_rule(struct sv_policy *policy, const char *name, unsigned int error,
		   const struct sv_condition *conditions, unsigned int count)
{
	struct scmp_arg_cmp arguments[MAX_CONDITIONS];
	int number = seccomp_syscall_resolve_name(name);

	if (number == __NR_SCMP_ERROR)
		return -ENOSYS;
	if (number < 0)
		return 0; // another architecture's: here nobody can call it
	if (count > MAX_CONDITIONS)
		return -EINVAL;
	for (unsigned int i = 0; i < count; i++) {
		if (conditions[i].argument >= MAX_CONDITIONS)
			return -EINVAL;
		arguments[i] = SCMP_CMP64(conditions[i].argument, SCMP_CMP_MASKED_EQ,
					  conditions[i].mask, conditions[i].value);
	}
	return seccomp_rule_add_array(policy->context,
				      error ? SCMP_ACT_ERRNO(error) : SCMP_ACT_ALLOW, number,
				      count, arguments);
}

int sv_policy_export(struct sv_policy *policy, uint8_t *program, size_t size)
{
	int fd = memfd_create("filter", MFD_CLOEXEC);
	ssize_t length;
	int ret;

	if (fd < 0)
		return -errno;
	ret = seccomp_export_bpf(policy->context, fd);
	if (ret == 0) {
		length = pread(fd, program, size, 0);
		ret = length < 0 ? -errno : (size_t)length == size ? -E2BIG : (int)length;
	}
	close(fd);
	return ret;
}

int sv_filter_install(const uint8_t *program, size_t size)
{
	struct sock_fprog prog = {
		.len = (unsigned short)(size / sizeof(struct sock_filter)),
		.filter = (struct sock_filter *)(uintptr_t)program,
	};

	if (!size || size % sizeof(struct sock_filter) || size / sizeof(struct sock_filter) > 0xFFFF)
		return -EINVAL;
	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &prog) < 0 ? -errno : 0;
}

int sv_system_call_number(const char *name)
{
	int number = seccomp_syscall_resolve_name(name);

	return number == __NR_SCMP_ERROR ? -ENOSYS : number;
}

int sv_system_call_name(int number, char *name, size_t size)
{
	char *found = seccomp_syscall_resolve_num_arch(SCMP_ARCH_NATIVE, number);
	size_t at = 0;

	if (!found)
		return -ENOSYS;
	for (; at + 1 < size && found[at]; at++)
		name[at] = found[at];
	name[at] = 0;
	free(found);
	return (int)at;
}
