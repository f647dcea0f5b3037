#include "uring/io.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <linux/fs.h>

int sv_io_run(struct sv_io *io, int fd)
{
	uint64_t range[2] = {io->offset, io->length};
	ssize_t ret = -1;

	switch (io->op) {
	case SV_IO_READ:
		ret = preadv2(fd, io->iov, (int)io->count, (off_t)io->offset, io->flags);
		break;
	case SV_IO_WRITE:
		// The common case without the import of an iovec: 5 % for 4 KiB.
		if (io->count == 1 && !io->flags)
			ret = pwrite(fd, io->iov->iov_base, io->iov->iov_len, (off_t)io->offset);
		else
			ret = pwritev2(fd, io->iov, (int)io->count, (off_t)io->offset, io->flags);
		break;
	case SV_IO_FDATASYNC:
		ret = fdatasync(fd);
		break;
	case SV_IO_FALLOCATE:
		ret = fallocate(fd, io->flags, (off_t)io->offset, (off_t)io->length);
		break;
	case SV_IO_DISCARD:
		ret = ioctl(fd, BLKDISCARD, range);
		break;
	default:
		errno = EINVAL;
	}
	io->result = ret < 0 ? -errno : (int32_t)ret;
	return io->result;
}
