// Control messages (virtio 1.2, 5.3.6.2). What the driver is still to be told follows from what
// it was told: nothing is queued, whatever it asks for and however often.
#include <string.h>

#include <linux/virtio_console.h>

#include "console/internal.h"

struct message {
	struct virtio_console_control head;
	unsigned int nr;
	const void *data; // behind the head
	size_t len;
	uint16_t size[2]; // columns, rows
};

static bool fill(struct message *message, unsigned int nr, uint16_t event, uint16_t value)
{
	message->head = (struct virtio_console_control){nr, event, value};
	message->nr = nr;
	message->data = NULL;
	message->len = 0;
	return true;
}

// What a port's driver is to be told next. False: nothing.
static bool next_of_port(const struct console *console, unsigned int nr, struct message *message)
{
	const struct sv_console_port_state *state = &console->state->ports[nr];
	const struct sv_console_port *is = &console->ports[nr].is;
	// A terminal is always there: what is written to it is lost while nobody looks.
	bool open = is->console || is->open;

	if (is->fd == -1)
		return false;
	if (!state->told_port)
		return fill(message, nr, VIRTIO_CONSOLE_PORT_ADD, 1);
	if (!state->ready)
		return false;
	if (is->console && !state->told_console)
		return fill(message, nr, VIRTIO_CONSOLE_CONSOLE_PORT, 1);
	if (is->name[0] && !state->told_name) {
		fill(message, nr, VIRTIO_CONSOLE_PORT_NAME, 1);
		message->data = is->name;
		message->len = strlen(is->name);
		return true;
	}
	if (open != state->told_open)
		return fill(message, nr, VIRTIO_CONSOLE_PORT_OPEN, open);
	if (is->console && is->cols && is->rows &&
	    (is->cols != state->told_cols || is->rows != state->told_rows)) {
		fill(message, nr, VIRTIO_CONSOLE_RESIZE, 0);
		message->size[0] = is->cols;
		message->size[1] = is->rows;
		message->data = message->size;
		message->len = sizeof(message->size);
		return true;
	}
	return false;
}

static bool next_message(const struct console *console, struct message *message)
{
	if (!console->state->device_ready)
		return false;
	for (unsigned int nr = 0; nr < console->max_ports; nr++) {
		if (next_of_port(console, nr, message))
			return true;
	}
	return false;
}

// The driver has it.
static void told(struct console *console, const struct message *message)
{
	struct sv_console_port_state *state = &console->state->ports[message->nr];

	switch (message->head.event) {
	case VIRTIO_CONSOLE_PORT_ADD:
		SV_CONSOLE_REMEMBER(state->told_port, 1);
		break;
	case VIRTIO_CONSOLE_CONSOLE_PORT:
		SV_CONSOLE_REMEMBER(state->told_console, 1);
		break;
	case VIRTIO_CONSOLE_PORT_NAME:
		SV_CONSOLE_REMEMBER(state->told_name, 1);
		break;
	case VIRTIO_CONSOLE_PORT_OPEN:
		SV_CONSOLE_REMEMBER(state->told_open, (uint8_t)message->head.value);
		break;
	default:
		SV_CONSOLE_REMEMBER(state->told_cols, message->size[0]);
		SV_CONSOLE_REMEMBER(state->told_rows, message->size[1]);
	}
}

static size_t put(const struct sv_chain *chain, size_t at, const void *data, size_t len)
{
	const uint8_t *from = data;
	size_t done = 0;

	for (unsigned int i = 0; i < chain->in_count && done < len; i++) {
		size_t room = chain->iov[i].iov_len;
		size_t piece;

		if (at >= room) {
			at -= room;
			continue;
		}
		piece = room - at < len - done ? room - at : len - done;
		memcpy((uint8_t *)chain->iov[i].iov_base + at, from + done, piece);
		done += piece;
		at = 0;
	}
	return done;
}

enum sv_ring_next sv_console_tell(struct sv_ring_device *device)
{
	struct sv_virtq *vq = &device->queues[SV_CONSOLE_CONTROL_RX].vq;
	struct sv_chain *chain = device->chain;
	struct console *console = device->own;

	for (unsigned int i = 0; i < SV_CONSOLE_BATCH; i++) {
		struct message message;
		size_t len;

		if (!next_message(console, &message))
			return SV_RING_WAITS;
		if (sv_virtq_pop(vq, chain) <= 0)
			return SV_RING_EMPTY;
		if (chain->out_count || chain->in_bytes < sizeof(message.head)) {
			sv_virtq_break(vq, "a control buffer that can't hold a message");
			return SV_RING_EMPTY;
		}
		len = put(chain, 0, &message.head, sizeof(message.head));
		len += put(chain, len, message.data, message.len); // a long name may be cut
		sv_ring_push(device, SV_CONSOLE_CONTROL_RX, chain->head, (uint32_t)len);
		// Told once more by a successor is better than never.
		sv_virtq_publish(vq);
		told(console, &message);
	}
	return SV_RING_MORE;
}

static void set_device_ready(struct console *console)
{
	for (unsigned int nr = 0; nr < console->max_ports; nr++)
		SV_CONSOLE_REMEMBER(console->state->ports[nr].told_port, 0);
	SV_CONSOLE_REMEMBER(console->state->device_ready, 1);
}

static void set_ready(struct sv_console_port_state *state, bool ready)
{
	SV_CONSOLE_REMEMBER(state->told_console, 0);
	SV_CONSOLE_REMEMBER(state->told_name, 0);
	SV_CONSOLE_REMEMBER(state->told_open, 0);
	SV_CONSOLE_REMEMBER(state->told_cols, 0);
	SV_CONSOLE_REMEMBER(state->told_rows, 0);
	SV_CONSOLE_REMEMBER(state->ready, ready);
}

// False: the message makes no sense.
static bool obey(struct sv_ring_device *device, const struct virtio_console_control *message)
{
	struct console *console = device->own;
	struct sv_console_port_state *state;

	if (message->event == VIRTIO_CONSOLE_DEVICE_READY) {
		if (message->value)
			set_device_ready(console);
		return message->value;
	}
	if (message->id >= console->max_ports || console->ports[message->id].is.fd == -1)
		return false;
	state = &console->state->ports[message->id];
	switch (message->event) {
	case VIRTIO_CONSOLE_PORT_READY:
		set_ready(state, message->value);
		return true;
	case VIRTIO_CONSOLE_PORT_OPEN:
		SV_CONSOLE_REMEMBER(state->guest_open, message->value ? 1 : 0);
		sv_ring_due(device, sv_console_rx(message->id));
		return true;
	default:
		return false;
	}
}

// The first bytes of a message; false: it is shorter.
static bool take(const struct sv_chain *chain, struct virtio_console_control *message)
{
	uint8_t *to = (uint8_t *)message;
	size_t left = sizeof(*message);

	if (chain->out_bytes < left)
		return false;
	for (unsigned int i = 0; left; i++) {
		size_t piece = chain->iov[i].iov_len < left ? chain->iov[i].iov_len : left;

		memcpy(to, chain->iov[i].iov_base, piece);
		to += piece;
		left -= piece;
	}
	return true;
}

enum sv_ring_next sv_console_listen(struct sv_ring_device *device)
{
	struct sv_virtq *vq = &device->queues[SV_CONSOLE_CONTROL_TX].vq;
	struct sv_chain *chain = device->chain;

	for (unsigned int i = 0; i < SV_CONSOLE_BATCH; i++) {
		struct virtio_console_control message;

		if (sv_virtq_pop(vq, chain) <= 0)
			return SV_RING_EMPTY;
		if (chain->in_count) {
			sv_virtq_break(vq, "a control message to be written");
			return SV_RING_EMPTY;
		}
		if (take(chain, &message) && obey(device, &message))
			sv_ring_due(device, SV_CONSOLE_CONTROL_RX);
		else
			sv_console_counters_of(device, SV_CONSOLE_CONTROL_TX)->errors++;
		sv_ring_push(device, SV_CONSOLE_CONTROL_TX, chain->head, 0);
	}
	return SV_RING_MORE;
}
