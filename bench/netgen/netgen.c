// The driver's side of virtio-net rings and bare loops on a tap, for bench/net.py.
// Each function returns the number of frames, or a negative errno.
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <linux/virtio_ring.h>

#define HEADER 12
#define WAIT_MS 2000

struct ring {
	uint8_t *memory;      // host address of guest address `base`
	uint64_t base;
	uint64_t desc, avail, used;
	uint64_t buffers;     // `size` buffers of `stride` bytes, guest addresses
	uint64_t tables;      // an indirect table of 32 entries a head; 0: none
	uint32_t size, stride, length; // `length`: bytes of a buffer that are used
	int32_t kick_fd, call_fd;
};

static void *host(const struct ring *ring, uint64_t address)
{
	return ring->memory + (address - ring->base);
}

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

static void fill_desc(const struct ring *ring, uint16_t head, uint16_t flags)
{
	struct vring_desc *desc = host(ring, ring->desc);
	uint64_t at = ring->buffers + (uint64_t)head * ring->stride;
	uint32_t left = ring->length, count = 0;
	struct vring_desc *table;

	if (!ring->tables || left <= 4096) {
		desc[head] = (struct vring_desc){at, left, flags, 0};
		return;
	}
	table = host(ring, ring->tables + (uint64_t)head * 32 * 16);
	for (; left; count++) {
		uint32_t piece = left < 4096 ? left : 4096;

		table[count] = (struct vring_desc){at, piece, (uint16_t)(flags | VRING_DESC_F_NEXT),
						   (uint16_t)(count + 1)};
		at += piece;
		left -= piece;
	}
	table[count - 1].flags = flags;
	desc[head] = (struct vring_desc){ring->tables + (uint64_t)head * 32 * 16, count * 16,
					 VRING_DESC_F_INDIRECT, 0};
}

struct driver {
	const struct ring *ring;
	struct vring_avail *avail;
	struct vring_used *used;
	uint16_t avail_idx, used_seen, kicked;
};

static void kick(struct driver *driver)
{
	uint16_t *event = (void *)&driver->used->ring[driver->ring->size];

	__atomic_store_n(&driver->avail->idx, driver->avail_idx, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (vring_need_event(__atomic_load_n(event, __ATOMIC_RELAXED), driver->avail_idx,
			     driver->kicked))
		eventfd_write(driver->ring->kick_fd, 1);
	driver->kicked = driver->avail_idx;
}

// Wait for a call, asked for once half of what is out was used. False: it took too long.
static bool wait_call(struct driver *driver, uint16_t ahead)
{
	struct pollfd fd = {driver->ring->call_fd, POLLIN, 0};
	eventfd_t value;

	__atomic_store_n(&driver->avail->ring[driver->ring->size],
			 (uint16_t)(driver->used_seen + ahead), __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if ((uint16_t)(__atomic_load_n(&driver->used->idx, __ATOMIC_ACQUIRE) -
		       driver->used_seen) > ahead)
		return true;
	if (poll(&fd, 1, WAIT_MS) <= 0)
		return false;
	eventfd_read(driver->ring->call_fd, &value);
	return true;
}

static void begin(struct driver *driver, const struct ring *ring)
{
	*driver = (struct driver){ring, host(ring, ring->avail), host(ring, ring->used), 0, 0, 0};
}

// Send `count` frames, which lie in the buffers with their headers.
long ng_transmit(const struct ring *ring, long count)
{
	struct driver driver;
	long queued = 0, done = 0;

	begin(&driver, ring);
	for (uint16_t i = 0; i < ring->size; i++)
		fill_desc(ring, i, 0);
	while (done < count) {
		uint16_t used = __atomic_load_n(&driver.used->idx, __ATOMIC_ACQUIRE);

		done += (uint16_t)(used - driver.used_seen);
		driver.used_seen = used;
		while (queued < count && queued - done < (long)ring->size) {
			driver.avail->ring[driver.avail_idx % ring->size] =
				(uint16_t)(queued++ % ring->size);
			driver.avail_idx++;
		}
		kick(&driver);
		if (done < count && !wait_call(&driver, (uint16_t)((queued - done) / 2)))
			return -ETIMEDOUT;
	}
	return done;
}

// Receive for `ns` nanoseconds; *bytes: of the frames, headers left out.
long ng_receive(const struct ring *ring, uint64_t ns, uint64_t *bytes)
{
	uint64_t end = now_ns() + ns;
	struct driver driver;
	long frames = 0;

	*bytes = 0;
	begin(&driver, ring);
	for (uint16_t i = 0; i < ring->size; i++) {
		fill_desc(ring, i, VRING_DESC_F_WRITE);
		driver.avail->ring[driver.avail_idx++ % ring->size] = i;
	}
	kick(&driver);
	while (now_ns() < end) {
		uint16_t used = __atomic_load_n(&driver.used->idx, __ATOMIC_ACQUIRE);

		while (driver.used_seen != used) {
			struct vring_used_elem *elem =
				&driver.used->ring[driver.used_seen++ % ring->size];
			uint16_t buffers;

			// Heads are buffers; the first of a frame says how many follow.
			memcpy(&buffers, (uint8_t *)host(ring, ring->buffers +
				(uint64_t)elem->id * ring->stride) + 10, 2);
			*bytes += elem->len - HEADER;
			driver.avail->ring[driver.avail_idx++ % ring->size] = (uint16_t)elem->id;
			for (uint16_t i = 1; i < buffers; i++) {
				elem = &driver.used->ring[driver.used_seen++ % ring->size];
				*bytes += elem->len;
				driver.avail->ring[driver.avail_idx++ % ring->size] = (uint16_t)elem->id;
			}
			frames++;
		}
		kick(&driver);
		if (!wait_call(&driver, 0))
			break;
	}
	return frames;
}

static uint64_t thread_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
	return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

// The floor: write the same frame `count` times; *cpu_ns: of this thread.
long ng_write(int tap, const void *frame, uint32_t length, long count, uint64_t *cpu_ns)
{
	uint64_t before = thread_ns();

	for (long i = 0; i < count; i++) {
		if (write(tap, frame, length) < 0)
			return -errno;
	}
	*cpu_ns = thread_ns() - before;
	return count;
}

// The floor: read frames for `ns` nanoseconds.
long ng_read(int tap, void *buffer, uint32_t size, uint64_t ns, uint64_t *bytes, uint64_t *cpu_ns)
{
	uint64_t before = thread_ns(), end = now_ns() + ns;
	long frames = 0;

	*bytes = 0;
	while (now_ns() < end) {
		for (int i = 0; i < 64; i++) {
			ssize_t len = read(tap, buffer, size);

			if (len < 0 && errno == EAGAIN) {
				struct pollfd fd = {tap, POLLIN, 0};

				poll(&fd, 1, 100);
				break;
			}
			if (len < 0)
				return -errno;
			*bytes += (uint64_t)len - HEADER;
			frames++;
		}
	}
	*cpu_ns = thread_ns() - before;
	return frames;
}

// Send the same frame through a packet socket for `ns` nanoseconds; the tap drops what is too
// much for it.
long ng_flood(int socket, const void *frame, uint32_t length, uint64_t ns)
{
	struct iovec iov = {(void *)frame, length};
	struct mmsghdr messages[32];
	uint64_t end = now_ns() + ns;
	long sent = 0;

	memset(messages, 0, sizeof(messages));
	for (unsigned int i = 0; i < 32; i++) {
		messages[i].msg_hdr.msg_iov = &iov;
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	while (now_ns() < end) {
		int ret = sendmmsg(socket, messages, 32, 0);

		if (ret < 0 && errno != ENOBUFS && errno != EAGAIN)
			return -errno;
		sent += ret > 0 ? ret : 0;
	}
	return sent;
}
