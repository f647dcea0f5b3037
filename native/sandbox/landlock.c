#include "sandbox/sandbox.h"

#include <errno.h>
#include <linux/landlock.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

// Rights and fields by the ABI that brought them: the header at hand may be older than the
// kernel that we run on. Linux, Documentation/userspace-api/landlock.rst, "Kernel interface".
#define FS_RIGHTS_1 ((1ull << 13) - 1)      // EXECUTE to MAKE_SYM
#define FS_REFER (1ull << 13)               // ABI 2
#define FS_TRUNCATE (1ull << 14)            // ABI 3
#define NET_RIGHTS_4 3ull                   // ABI 4: BIND_TCP, CONNECT_TCP
#define FS_IOCTL_DEV (1ull << 15)           // ABI 5
#define SCOPES_6 3ull                       // ABI 6: abstract unix sockets, signals

struct attributes {
	uint64_t fs;
	uint64_t net;
	uint64_t scoped;
};

int sv_landlock_abi(void)
{
	long abi = syscall(SYS_landlock_create_ruleset, NULL, 0,
			   LANDLOCK_CREATE_RULESET_VERSION);

	return abi < 0 ? -errno : (int)abi;
}

int sv_landlock_deny_all(void)
{
	struct attributes attr = {.fs = FS_RIGHTS_1};
	size_t size = sizeof(attr.fs);
	int abi = sv_landlock_abi();
	int fd, ret;

	if (abi < 0)
		return abi;
	attr.fs |= (abi >= 2 ? FS_REFER : 0) | (abi >= 3 ? FS_TRUNCATE : 0) |
		   (abi >= 5 ? FS_IOCTL_DEV : 0);
	if (abi >= 4) {
		attr.net = NET_RIGHTS_4;
		size += sizeof(attr.net);
	}
	if (abi >= 6) {
		attr.scoped = SCOPES_6;
		size += sizeof(attr.scoped);
	}
	fd = (int)syscall(SYS_landlock_create_ruleset, &attr, size, 0);
	if (fd < 0)
		return -errno;
	ret = syscall(SYS_landlock_restrict_self, fd, 0) < 0 ? -errno : 0;
	close(fd);
	return ret < 0 ? ret : abi;
}
