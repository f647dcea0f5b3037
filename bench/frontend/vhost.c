// The front end's half of vhost-user, as much as load generators need.
// Source: QEMU, docs/interop/vhost-user.rst.
#include "frontend.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <linux/vhost_types.h>
#include <linux/virtio_config.h>

enum {
	GET_FEATURES = 1, SET_FEATURES = 2, SET_OWNER = 3, SET_MEM_TABLE = 5, SET_VRING_NUM = 8,
	SET_VRING_ADDR = 9, SET_VRING_BASE = 10, GET_VRING_BASE = 11, SET_VRING_KICK = 12,
	SET_VRING_CALL = 13, GET_PROTOCOL_FEATURES = 15, SET_PROTOCOL_FEATURES = 16,
	SET_VRING_ENABLE = 18, GET_CONFIG = 24,
};
enum { PROTOCOL_REPLY_ACK = 1 << 3, PROTOCOL_CONFIG = 1 << 9 };
#define HAS_PROTOCOL_FEATURES (1ull << 30)
#define VERSION 1u
#define IS_REPLY 4u
#define NEED_REPLY 8u
#define LIMIT_S 20

struct header {
	uint32_t request, flags, size;
};

struct region {
	uint64_t guest, size, user, offset;
};

static void send_message(struct vhost *vhost, uint32_t request, uint32_t flags, const void *payload,
			 uint32_t size, int fd)
{
	struct header header = {request, VERSION | flags, size};
	struct iovec iov[2] = {{&header, sizeof(header)}, {(void *)payload, size}};
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} control = {0};
	struct msghdr message = {.msg_iov = iov, .msg_iovlen = 2};

	if (fd >= 0) {
		message.msg_control = &control;
		message.msg_controllen = sizeof(control.space);
		control.header = (struct cmsghdr){CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
		memcpy(CMSG_DATA(&control.header), &fd, sizeof(fd));
	}
	if (sendmsg(vhost->socket, &message, MSG_NOSIGNAL) != (ssize_t)(sizeof(header) + size))
		fail("vhost-user: message %u can't be sent: %s", request, strerror(errno));
}

static void receive_reply(struct vhost *vhost, uint32_t request, void *payload, uint32_t size)
{
	struct header header;

	if (recv(vhost->socket, &header, sizeof(header), MSG_WAITALL) != sizeof(header))
		fail("vhost-user: no reply to message %u", request);
	if (header.request != request || !(header.flags & IS_REPLY) || header.size != size)
		fail("vhost-user: wrong reply to message %u: %u, flags 0x%x, %u bytes", request,
		     header.request, header.flags, header.size);
	if (recv(vhost->socket, payload, size, MSG_WAITALL) != (ssize_t)size)
		fail("vhost-user: reply to message %u is cut", request);
}

// A message without an answer of its own: its acknowledgement is waited for.
static void set(struct vhost *vhost, uint32_t request, const void *payload, uint32_t size, int fd)
{
	uint64_t status = 0;

	send_message(vhost, request, vhost->reply_ack ? NEED_REPLY : 0, payload, size, fd);
	if (!vhost->reply_ack)
		return;
	receive_reply(vhost, request, &status, sizeof(status));
	if (status)
		fail("vhost-user: the back end refused message %u", request);
}

static uint64_t get_u64(struct vhost *vhost, uint32_t request)
{
	uint64_t value = 0;

	send_message(vhost, request, 0, NULL, 0, -1);
	receive_reply(vhost, request, &value, sizeof(value));
	return value;
}

void vhost_read_config(struct vhost *vhost, void *config, uint32_t size)
{
	struct {
		uint32_t offset, size, flags;
		uint8_t config[256];
	} request = {0, size, 0, {0}};

	if (!vhost->has_config || size > sizeof(request.config))
		fail("vhost-user: the back end has no configuration space of %u bytes", size);
	send_message(vhost, GET_CONFIG, 0, &request, 12 + size, -1);
	receive_reply(vhost, GET_CONFIG, &request, 12 + size);
	memcpy(config, request.config, size);
}

void vhost_connect(struct vhost *vhost, const char *path, uint64_t wanted)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct timeval limit = {.tv_sec = LIMIT_S};
	uint64_t deadline = now_ns() + LIMIT_S * 1000000000ull, offered, protocol;

	memset(vhost, 0, sizeof(*vhost));
	if (strlen(path) >= sizeof(address.sun_path))
		fail("--socket %s: the path is too long", path);
	strcpy(address.sun_path, path);
	vhost->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	while (connect(vhost->socket, (struct sockaddr *)&address, sizeof(address)) < 0) {
		if (now_ns() > deadline)
			fail("--socket %s: %s", path, strerror(errno));
		usleep(2000); // the back end is still starting
	}
	setsockopt(vhost->socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));

	offered = get_u64(vhost, GET_FEATURES);
	if (!(offered & HAS_PROTOCOL_FEATURES))
		fail("vhost-user: the back end has no protocol features");
	protocol = get_u64(vhost, GET_PROTOCOL_FEATURES) & (PROTOCOL_REPLY_ACK | PROTOCOL_CONFIG);
	set(vhost, SET_PROTOCOL_FEATURES, &protocol, sizeof(protocol), -1);
	vhost->has_config = protocol & PROTOCOL_CONFIG;
	vhost->reply_ack = protocol & PROTOCOL_REPLY_ACK;
	set(vhost, SET_OWNER, NULL, 0, -1);
	vhost->features = offered & (wanted | HAS_PROTOCOL_FEATURES | 1ull << VIRTIO_F_VERSION_1);
	if (!(vhost->features & 1ull << VIRTIO_F_VERSION_1))
		fail("vhost-user: the back end doesn't offer VERSION_1");
	set(vhost, SET_FEATURES, &vhost->features, sizeof(vhost->features), -1);
}

void vhost_set_memory(struct vhost *vhost, const struct guest_memory *memory)
{
	struct {
		uint32_t count, padding;
		struct region region;
	} table = {1, 0, {0, memory->size, (uint64_t)memory->base, 0}};

	set(vhost, SET_MEM_TABLE, &table, sizeof(table), memory->fd);
}

void vhost_start_ring(struct vhost *vhost, const struct guest_memory *memory,
		      const struct ring *ring, unsigned int index)
{
	uint64_t user = (uint64_t)memory->base, number = index;
	struct vhost_vring_state num = {index, ring->size}, base = {index, 0}, enable = {index, 1};
	struct vhost_vring_addr addr = {
		.index = index,
		.desc_user_addr = user + ring->desc_addr,
		.used_user_addr = user + ring->used_addr,
		.avail_user_addr = user + ring->avail_addr,
	};

	set(vhost, SET_VRING_NUM, &num, sizeof(num), -1);
	set(vhost, SET_VRING_BASE, &base, sizeof(base), -1);
	set(vhost, SET_VRING_ADDR, &addr, sizeof(addr), -1);
	set(vhost, SET_VRING_CALL, &number, sizeof(number), ring->call_fd);
	set(vhost, SET_VRING_KICK, &number, sizeof(number), ring->kick_fd);
	set(vhost, SET_VRING_ENABLE, &enable, sizeof(enable), -1);
}

void vhost_stop_ring(struct vhost *vhost, unsigned int index)
{
	struct vhost_vring_state state = {index, 0};

	send_message(vhost, GET_VRING_BASE, 0, &state, sizeof(state), -1);
	receive_reply(vhost, GET_VRING_BASE, &state, sizeof(state));
}
