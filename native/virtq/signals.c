#include "virtq/signals.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

int sv_signals_init(struct sv_signals *signals)
{
	signals->has_call = false;
	signals->err_fd = -1;
	signals->call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return signals->call_fd < 0 ? -errno : 0;
}

void sv_signals_deinit(struct sv_signals *signals)
{
	if (signals->call_fd >= 0)
		close(signals->call_fd);
	signals->call_fd = -1;
}

int sv_signals_set_call(struct sv_signals *signals, int fd)
{
	if (fd < 0) {
		__atomic_store_n(&signals->has_call, false, __ATOMIC_RELEASE);
		return 0;
	}
	// The queue's thread may be about to write: the number stays valid, its file changes.
	if (dup3(fd, signals->call_fd, O_CLOEXEC) < 0)
		return -errno;
	__atomic_store_n(&signals->has_call, true, __ATOMIC_RELEASE);
	return 0;
}

int sv_signals_begin(struct sv_signals *signals, int call_fd, int err_fd)
{
	int ret = sv_signals_set_call(signals, call_fd);

	if (ret < 0 || err_fd < 0)
		return ret;
	signals->err_fd = fcntl(err_fd, F_DUPFD_CLOEXEC, 0);
	return signals->err_fd < 0 ? -errno : 0;
}

void sv_signals_end(struct sv_signals *signals)
{
	if (signals->err_fd >= 0)
		close(signals->err_fd);
	signals->err_fd = -1;
}

void sv_signals_broken(struct sv_signals *signals, uint64_t *broken)
{
	if (*broken)
		return;
	// After the reason, which the control thread reads once it sees this.
	__atomic_store_n(broken, 1, __ATOMIC_RELEASE);
	if (signals->err_fd >= 0)
		eventfd_write(signals->err_fd, 1);
}
