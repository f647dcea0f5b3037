#include "sandbox/sandbox.h"

#include <errno.h>
#include <linux/io_uring.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int sv_try_restricted_ring(void)
{
	struct io_uring_params params = {.flags = IORING_SETUP_R_DISABLED};
	struct io_uring_restriction rule = {
		.opcode = IORING_RESTRICTION_SQE_FLAGS_REQUIRED,
		.sqe_flags = IOSQE_FIXED_FILE,
	};
	int fd = (int)syscall(SYS_io_uring_setup, 1, &params);
	int ret = 0;

	if (fd < 0)
		return -errno;
	if (syscall(SYS_io_uring_register, fd, IORING_REGISTER_RESTRICTIONS, &rule, 1) < 0)
		ret = -errno;
	close(fd);
	return ret;
}
