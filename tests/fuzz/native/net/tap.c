// The tap is one end of a pair of datagram sockets; threads run by a call.
#include <errno.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <string.h>
#include <sys/ioctl.h>

#include "world.h"

#define MAX_POLLS 6 // of one slice

static int create(void *(*run)(void *), void *argument)
{
	static const int errors[] = {EAGAIN};

	world.run = run;
	return world.more & F_FAIL ? fuzz_failure(errors, 1) : 0;
}

// The end of a queue: its thread was asked to, and may look up once more.
static void join(void)
{
	for (unsigned int i = 0; i < world.count; i++) {
		struct sv_net_queue *queue = &world.net->queues[i];

		if (queue->running && queue->stop) {
			world.current = queue;
			epoch_begin();
			world.run(queue);
			guest_epoch_end();
			world.current = NULL;
		}
	}
}

static int wait_a_little(struct pollfd *fds, nfds_t count, const struct timespec *limit)
{
	struct sv_net_queue *queue = world.current;
	unsigned int index = index_of(queue);
	int ready;

	guest_epoch_end();
	end_frame(index);
	CHECK(!world.told[index] || queue->tap < 0); // else it looks again for ever
	if (queue->stop) {
		CHECK(world.polls++ <= MAX_POLLS); // woken up for it, once
		world.polls += MAX_POLLS;
		epoch_begin();
		return 0;
	}
	if (fds[1].fd >= 0)
		CHECK(queue->vq.avail->idx == queue->vq.last_avail);
	if (++world.polls > MAX_POLLS || !fuzz_tape_left)
		queue->stop = true;
	else
		for (unsigned int acts = next_byte() % 4; acts; acts--)
			act();
	ready = fuzz_look(fds, count, limit);
	if (queue->tap >= 0 && world.gone[index / 2] && fds[2].fd >= 0) {
		fds[2].revents = POLLERR;
		world.told[index] = true;
		ready++;
	}
	if (!ready && !limit)
		queue->stop = true; // else it would sleep for ever
	epoch_begin();
	return ready;
}

static unsigned int pair_of(int fd)
{
	unsigned int pair = 0;

	while (pair < world.pairs && taps[pair] != fd)
		pair++;
	CHECK(pair < world.pairs);
	return pair;
}

static int fail(int error)
{
	errno = error;
	return error ? -1 : 0;
}

static int set_tap(int fd, unsigned long request, void *argument)
{
	static const int errors[] = {EINVAL, EBADFD, EBUSY, EPERM};
	unsigned int pair = pair_of(fd), flags = (unsigned int)(uintptr_t)argument;
	int error = world.more & F_FAIL ? fuzz_failure(errors, 4) : 0;

	world.refused |= error != 0;
	if (error)
		return fail(error);
	if (request == TUNSETOFFLOAD) {
		CHECK(!(flags & ~(TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | TUN_F_UFO)));
		CHECK(flags & TUN_F_CSUM || !flags);
		CHECK(flags & (TUN_F_TSO4 | TUN_F_TSO6) || !(flags & TUN_F_TSO_ECN));
		world.offloads = flags;
		return 0;
	}
	CHECK(request == TUNSETQUEUE && pair);
	flags = (unsigned short)((const struct ifreq *)argument)->ifr_flags;
	CHECK(flags == IFF_ATTACH_QUEUE || flags == IFF_DETACH_QUEUE);
	if (world.attached[pair] == (flags == IFF_ATTACH_QUEUE))
		return fail(EINVAL);
	world.attached[pair] = flags == IFF_ATTACH_QUEUE;
	return 0;
}

// What a read has put there, in one piece.
static const uint8_t *gather(unsigned int pair, const struct iovec *iov, size_t len)
{
	static uint8_t data[MAX_PAIRS][2 * SV_NET_FRAME_MAX];
	size_t done = 0;

	if (threads() || len > sizeof(data[0]))
		return NULL;
	for (; done < len; iov++) {
		size_t piece = iov->iov_len < len - done ? iov->iov_len : len - done;

		memcpy(data[pair] + done, iov->iov_base, piece);
		done += piece;
	}
	return data[pair];
}

static ssize_t receive(int fd, const struct iovec *iov, int count)
{
	static const int errors[] = {EINTR, EAGAIN, EFAULT, EIO};
	unsigned int pair = pair_of(fd);
	int error = world.more & F_FAIL && !threads() ? fuzz_failure(errors, 4) : 0;
	ssize_t len;

	end_frame(2 * pair);
	__atomic_add_fetch(&ledger_calls, 1, __ATOMIC_RELAXED);
	CHECK(count <= SV_NET_IOVS + 1);
	if (error || world.gone[pair])
		return fail(error ? error : EBADFD);
	len = readv(fd, iov, count);
	if (len > 0) {
		world.frames[2 * pair] = (struct frame){
			.length = (uint64_t)len, .data = gather(pair, iov, (size_t)len)};
		world.received[2 * pair]++;
	}
	return len;
}

static ssize_t transmit(int fd, const struct iovec *iov, int count)
{
	static const int errors[] = {EINTR, EAGAIN, EINVAL, EIO, ENOBUFS};
	unsigned int pair = pair_of(fd);
	int error = world.more & F_FAIL && !threads() ? fuzz_failure(errors, 5) : 0;
	ssize_t len;

	CHECK(count > 0 && count <= SV_CHAIN_MAX);
	if (error || world.gone[pair])
		return fail(error ? error : EBADFD);
	len = writev(fd, iov, count);
	CHECK(len < 0 || (len >= SV_NET_HEADER && len <= SV_NET_FRAME_MAX));
	return len;
}

void use_system(void)
{
	fuzz_system = (struct fuzz_system){.ioctl = set_tap, .readv = receive, .writev = transmit};
	if (threads())
		return;
	fuzz_system.create = create;
	fuzz_system.join = join;
	fuzz_system.ppoll = wait_a_little;
	fuzz_system.now = 1000000000ull;
}
