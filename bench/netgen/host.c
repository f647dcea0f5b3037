// The host's side of the tap: packet sockets and the interface's counters.
#include "netgen.h"

#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <linux/if_packet.h>
#include <linux/virtio_net.h>

#define BATCH 32u
#define HOST_HEADER sizeof(struct virtio_net_hdr)
#define QUIET_NS 500000000ull // nothing came for so long: nothing will

static void set(int socket, int level, int name, int value)
{
	if (setsockopt(socket, level, name, &value, sizeof(value)))
		fail("a packet socket refuses option %d: %s", name, strerror(errno));
}

static int open_socket(const struct options *options, uint16_t type)
{
	struct sockaddr_ll address = {
		.sll_family = AF_PACKET, .sll_protocol = htons(type),
		.sll_ifindex = (int)if_nametoindex(options->interface),
	};
	struct timeval limit = {.tv_usec = 50000};
	int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0);

	if (fd < 0 || !address.sll_ifindex)
		fail("--interface %s: %s", options->interface, strerror(errno));
	set(fd, SOL_PACKET, PACKET_VNET_HDR, 1);
	set(fd, SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20);
	set(fd, SOL_SOCKET, SO_SNDBUFFORCE, 256 << 20);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)))
		fail("--interface %s: %s", options->interface, strerror(errno));
	return fd;
}

// Packets that the interface took from the tap's owner.
static uint64_t packets_in(const struct options *options)
{
	FILE *file = fopen("/proc/thread-self/net/dev", "r");
	uint64_t packets = UINT64_MAX;
	char line[512], name[64];

	while (file && fgets(line, sizeof(line), file)) {
		uint64_t found;

		if (sscanf(line, " %63[^:]: %*u %lu", name, &found) == 2 &&
		    !strcmp(name, options->interface))
			packets = found;
	}
	if (!file || packets == UINT64_MAX)
		fail("--interface %s: it has no counters", options->interface);
	fclose(file);
	return packets;
}

// ---- sending --------------------------------------------------------------------------------------

struct sender {
	const struct options *options;
	int socket;
	unsigned int batch;
	uint64_t sent;
	struct iovec iov[BATCH];
	struct mmsghdr messages[BATCH];
};

struct sender *sender_open(const struct options *options)
{
	struct sender *sender = calloc(1, sizeof(*sender));

	sender->options = options;
	sender->socket = open_socket(options, 0);
	set(sender->socket, SOL_PACKET, PACKET_QDISC_BYPASS, 1);
	sender->batch = options->gso ? 4 : BATCH; // few large ones: the processor's caches hold them
	for (unsigned int i = 0; i < sender->batch; i++) {
		uint8_t *message = calloc(1, HOST_HEADER + options->length);

		frame_header(options, (void *)message);
		frame_make(options, message + HOST_HEADER, (uint16_t)i);
		sender->iov[i] = (struct iovec){message, HOST_HEADER + options->length};
		sender->messages[i].msg_hdr.msg_iov = &sender->iov[i];
		sender->messages[i].msg_hdr.msg_iovlen = 1;
	}
	return sender;
}

unsigned int sender_send(struct sender *sender, unsigned int count)
{
	int sent;

	if (count > sender->batch)
		count = sender->batch;
	for (unsigned int i = 0; i < count; i++)
		frame_stamp(sender->options, (uint8_t *)sender->iov[i].iov_base + HOST_HEADER,
			    sender->sent + i);
	sent = sendmmsg(sender->socket, sender->messages, count, 0);
	if (sent < 0 && errno != ENOBUFS && errno != EAGAIN)
		fail("the interface takes no frame: %s", strerror(errno));
	sender->sent += sent > 0 ? (uint64_t)sent : 0;
	return sent > 0 ? (unsigned int)sent : 0;
}

uint64_t sender_sent(const struct sender *sender)
{
	return sender->sent;
}

// ---- checking -------------------------------------------------------------------------------------

struct checker {
	const struct options *options;
	int socket;
	pthread_t thread;
	uint64_t before, next;
	uint64_t verified; // atomic
	bool stop;         // atomic
	uint8_t *data;
};

static void check(struct checker *checker, size_t length)
{
	const struct virtio_net_hdr *header = (const void *)checker->data;
	uint64_t sequence;

	if (length < HOST_HEADER)
		fail("the host got %zu bytes", length);
	sequence = frame_check(checker->options, checker->data + HOST_HEADER,
			       length - HOST_HEADER, true);
	if (checker->options->gso && (header->gso_type != VIRTIO_NET_HDR_GSO_TCPV4 ||
				      header->gso_size != MSS))
		fail("frame %lu came without its segmentation", sequence);
	if (sequence < checker->next)
		fail("frame %lu came after one with a higher number", sequence);
	checker->next = sequence + 1;
	__atomic_add_fetch(&checker->verified, 1, __ATOMIC_RELAXED);
}

static void *check_all(void *argument)
{
	struct checker *checker = argument;

	pin_to(checker->options->pin);
	while (!__atomic_load_n(&checker->stop, __ATOMIC_RELAXED)) {
		ssize_t length = recv(checker->socket, checker->data, 1 << 17, 0);

		if (length >= 0)
			check(checker, (size_t)length);
		else if (errno != EAGAIN && errno != EINTR)
			fail("the host gets no frames: %s", strerror(errno));
	}
	return NULL;
}

struct checker *checker_start(const struct options *options)
{
	struct checker *checker = calloc(1, sizeof(*checker));

	checker->options = options;
	checker->socket = open_socket(options, SAMPLED_TYPE);
	checker->data = malloc(1 << 17);
	checker->before = packets_in(options);
	if (pthread_create(&checker->thread, NULL, check_all, checker))
		fail("no thread");
	return checker;
}

void checker_finish(struct checker *checker, uint64_t expected, struct result *result)
{
	uint64_t came = 0, last = now_ns(), samples = (expected + SAMPLE - 1) / SAMPLE;
	uint64_t verified = 0;

	while ((came < expected || verified < samples) && now_ns() - last < QUIET_NS) {
		uint64_t packets = packets_in(checker->options) - checker->before;
		uint64_t now = __atomic_load_n(&checker->verified, __ATOMIC_RELAXED);

		if (packets != came || now != verified)
			last = now_ns();
		came = packets;
		verified = now;
		usleep(1000);
	}
	__atomic_store_n(&checker->stop, true, __ATOMIC_RELAXED);
	pthread_join(checker->thread, NULL);
	if (came > expected)
		fail("the interface counts %lu frames, %lu were sent", came, expected);
	result->lost = expected - came;
	result->verified = verified;
	if (!verified || (!result->lost && verified != samples))
		fail("of %lu frames that are to be verified %lu came", samples, verified);
}
