#include "sandbox/sandbox.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

int sv_unshare(unsigned long flags)
{
	return unshare((int)flags) < 0 ? -errno : 0;
}

static int write_map(pid_t pid, const char *name, const char *text)
{
	char path[64];
	ssize_t ret;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	ret = write(fd, text, strlen(text));
	ret = ret < 0 ? -errno : 0;
	close(fd);
	return (int)ret;
}

struct maps {
	pid_t pid;
	const char *uid_map, *gid_map;
	bool keep_groups;
	int go[2]; // a byte comes when there is a namespace
	int ret;
};

// The helper, still outside: an identity other than one's own can be mapped from there only.
static int write_maps(void *argument)
{
	struct maps *maps = argument;
	char byte;

	close(maps->go[1]);
	maps->ret = read(maps->go[0], &byte, 1) == 1 ? 0 : -EPIPE;
	if (!maps->ret && !maps->keep_groups)
		maps->ret = write_map(maps->pid, "setgroups", "deny");
	if (!maps->ret)
		maps->ret = write_map(maps->pid, "gid_map", maps->gid_map);
	if (!maps->ret)
		maps->ret = write_map(maps->pid, "uid_map", maps->uid_map);
	return 0;
}

int sv_enter_user_namespace(const char *uid_map, const char *gid_map, bool keep_groups)
{
	struct maps maps = {.pid = getpid(), .uid_map = uid_map, .gid_map = gid_map,
			    .keep_groups = keep_groups, .ret = -ECHILD};
	_Alignas(16) char stack[16384];
	int ret = 0, status;
	pid_t helper;

	if (pipe2(maps.go, O_CLOEXEC) < 0)
		return -errno;
	// In this address space: to copy an interpreter's takes a millisecond, and more later.
	// Each of the two acts only while the other one waits.
	helper = clone(write_maps, stack + sizeof(stack), CLONE_VM | SIGCHLD, &maps);
	if (helper < 0)
		ret = -errno;
	else if (unshare(CLONE_NEWUSER) < 0 || write(maps.go[1], "", 1) != 1)
		ret = -errno;
	close(maps.go[0]);
	close(maps.go[1]);
	while (helper > 0 && waitpid(helper, &status, 0) < 0 && errno == EINTR)
		;
	return ret ? ret : maps.ret;
}

#define EMPTY_OPTIONS "size=4k,nr_inodes=2,mode=0555"
#define EMPTY_FLAGS (MS_NOSUID | MS_NODEV | MS_NOEXEC)

int sv_empty_root(void)
{
	// Any directory will do: what it held can't be reached afterwards.
	static const char place[] = "/proc";

	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
	    mount("empty", place, "tmpfs", EMPTY_FLAGS, EMPTY_OPTIONS) < 0 || chdir(place) < 0)
		return -errno;
	if (syscall(SYS_pivot_root, ".", ".") == 0) {
		// Now the old root lies over the new one.
		if (umount2(".", MNT_DETACH) < 0)
			return -errno;
	} else if (errno != EINVAL || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0) {
		// EINVAL: the root is the initial ramfs, which can't be pivoted, but be covered.
		return -errno;
	}
	if (chdir("/") < 0 || mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY |
				    EMPTY_FLAGS, NULL) < 0)
		return -errno;
	return 0;
}
