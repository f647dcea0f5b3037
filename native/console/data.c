// What goes through the ports.
#include <errno.h>
#include <sys/socket.h>

#include <linux/virtio_console.h>

#include "console/internal.h"

static bool is_guest_open(const struct sv_ring_device *device, unsigned int nr)
{
	const struct console *console = device->own;

	// A driver that knows of one port only doesn't say when it opens it.
	return sv_console_has(device, VIRTIO_CONSOLE_F_MULTIPORT)
		       ? console->state->ports[nr].guest_open
		       : nr == 0;
}

// The socket has ended: nothing comes any more, and output is dropped.
static void hang_up(struct sv_ring_device *device, unsigned int nr)
{
	struct console *console = device->own;

	console->ports[nr].gone = true;
	sv_console_await(device, nr, 0, POLLIN | POLLOUT);
	sv_ring_due(device, sv_console_rx(nr) + 1);
}

enum sv_ring_next sv_console_receive(struct sv_ring_device *device, unsigned int nr)
{
	struct console *console = device->own;
	struct port *port = &console->ports[nr];
	unsigned int index = sv_console_rx(nr);
	struct sv_virtq *vq = &device->queues[index].vq;
	struct sv_chain *chain = device->chain;
	size_t total = 0;

	if (port->gone || !is_guest_open(device, nr))
		return SV_RING_WAITS;
	for (unsigned int i = 0; i < SV_CONSOLE_BATCH && total < SV_CONSOLE_BATCH_BYTES; i++) {
		struct msghdr message = {.msg_iov = chain->iov};
		ssize_t got;

		if (sv_virtq_pop(vq, chain) <= 0)
			return SV_RING_EMPTY; // what comes stays in the socket
		if (chain->out_count) {
			sv_virtq_break(vq, "a receive buffer to be read");
			return SV_RING_EMPTY;
		}
		message.msg_iovlen = chain->in_count;
		got = recvmsg(port->is.fd, &message, MSG_DONTWAIT);
		if (got <= 0) {
			sv_virtq_unpop(vq, chain->head);
			if (got < 0 && (errno == EAGAIN || errno == EINTR))
				sv_console_await(device, nr, POLLIN, 0);
			else
				hang_up(device, nr);
			return SV_RING_WAITS;
		}
		sv_ring_push(device, index, chain->head, (uint32_t)got);
		// At once: what was read is lost with this process until the driver can see it.
		sv_virtq_publish(vq);
		sv_console_counters_of(device, index)->bytes += (uint64_t)got;
		total += (size_t)got;
	}
	return SV_RING_MORE;
}

// Send what follows `skip` bytes of the chain, `max` at most.
static ssize_t send_rest(int fd, const struct sv_chain *chain, uint64_t skip, size_t max)
{
	struct iovec iov[64];
	struct msghdr message = {.msg_iov = iov};
	ssize_t sent;

	for (unsigned int i = 0; i < chain->out_count && message.msg_iovlen < 64 && max; i++) {
		struct iovec piece = chain->iov[i];

		if (skip >= piece.iov_len) {
			skip -= piece.iov_len;
			continue;
		}
		piece.iov_base = (uint8_t *)piece.iov_base + skip;
		piece.iov_len -= skip;
		if (piece.iov_len > max)
			piece.iov_len = max;
		skip = 0;
		max -= piece.iov_len;
		iov[message.msg_iovlen++] = piece;
	}
	do
		sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	return sent;
}

// How much of the chain at hand, taken last, has gone already.
static uint64_t sent_before(const struct sv_virtq *vq, const struct sv_console_port_state *state)
{
	return state->sent_index == (uint16_t)(vq->last_avail - 1) ? state->sent : 0;
}

static void remember(const struct sv_virtq *vq, struct sv_console_port_state *state,
		     uint64_t sent)
{
	SV_CONSOLE_REMEMBER(state->sent, 0);
	SV_CONSOLE_REMEMBER(state->sent_index, (uint16_t)(vq->last_avail - 1));
	SV_CONSOLE_REMEMBER(state->sent, sent);
}

// Send the chain at hand. SV_RING_EMPTY: it is dealt with; SV_RING_MORE: the batch ends before
// it; SV_RING_WAITS: the socket takes no more now.
static enum sv_ring_next send_chain(struct sv_ring_device *device, unsigned int nr, size_t *budget)
{
	struct console *console = device->own;
	struct port *port = &console->ports[nr];
	struct sv_console_port_state *state = &console->state->ports[nr];
	unsigned int index = sv_console_rx(nr) + 1;
	struct sv_console_counters *counters = sv_console_counters_of(device, index);
	const struct sv_virtq *vq = &device->queues[index].vq;
	const struct sv_chain *chain = device->chain;
	uint64_t sent = sent_before(vq, state);

	while (sent < chain->out_bytes) {
		ssize_t got;

		if (port->gone || !port->is.open) {
			counters->unheard += chain->out_bytes - sent;
			break;
		}
		if (!*budget)
			return SV_RING_MORE;
		got = send_rest(port->is.fd, chain, sent, *budget);
		if (got < 0 && errno == EAGAIN) {
			counters->waits++;
			return SV_RING_WAITS;
		}
		if (got <= 0) {
			hang_up(device, nr);
			continue;
		}
		sent += (uint64_t)got;
		*budget -= (size_t)got;
		counters->bytes += (uint64_t)got;
		remember(vq, state, sent);
	}
	return SV_RING_EMPTY;
}

enum sv_ring_next sv_console_transmit(struct sv_ring_device *device, unsigned int nr)
{
	struct console *console = device->own;
	unsigned int index = sv_console_rx(nr) + 1;
	struct sv_virtq *vq = &device->queues[index].vq;
	struct sv_chain *chain = device->chain;
	size_t budget = SV_CONSOLE_BATCH_BYTES;

	sv_console_await(device, nr, 0, POLLOUT);
	for (unsigned int i = 0; i < SV_CONSOLE_BATCH; i++) {
		enum sv_ring_next next;

		if (sv_virtq_pop(vq, chain) <= 0)
			return SV_RING_EMPTY;
		if (chain->in_count) {
			sv_virtq_break(vq, "a transmit buffer to be written");
			return SV_RING_EMPTY;
		}
		next = send_chain(device, nr, &budget);
		if (next != SV_RING_EMPTY) {
			sv_virtq_unpop(vq, chain->head);
			if (next == SV_RING_WAITS)
				sv_console_await(device, nr, POLLOUT, 0);
			return next;
		}
		sv_ring_push(device, index, chain->head, 0);
		sv_virtq_publish(vq); // at once: else a successor would send it again
		SV_CONSOLE_REMEMBER(console->state->ports[nr].sent, 0);
	}
	return SV_RING_MORE;
}
