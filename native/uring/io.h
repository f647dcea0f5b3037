// One operation on the image, asynchronous by io_uring or by a pool of threads.
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

enum sv_io_op {
	SV_IO_READ,
	SV_IO_WRITE,
	SV_IO_FDATASYNC,
	SV_IO_FALLOCATE, // flags: FALLOC_FL_*
	SV_IO_DISCARD,   // ioctl BLKDISCARD: by threads in either engine
};

// Lives in the request that it belongs to; the engine allocates nothing per operation.
struct sv_io {
	struct sv_io *next;        // in the engine's lists
	struct sv_engine *engine;  // who is told
	const struct iovec *iov;   // READ, WRITE: valid until it is reaped
	uint64_t offset;
	uint64_t length;           // FALLOCATE, DISCARD: bytes
	uint32_t count;            // READ, WRITE: entries of iov
	int32_t flags;             // READ, WRITE: RWF_*; FALLOCATE: mode
	int32_t result;            // bytes, 0, or a negative errno
	uint8_t op;
};

// Do it now, on this thread; the result, also left in io->result.
int sv_io_run(struct sv_io *io, int fd);
