// What frames hold.
#include "netgen.h"

#include <arpa/inet.h>
#include <string.h>

#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/tcp.h>
#include <linux/virtio_net.h>

#define GOLDEN 0x9e3779b97f4a7c15ull
#define HEADERS (sizeof(struct ethhdr) + sizeof(struct iphdr) + sizeof(struct tcphdr))

struct __attribute__((packed)) stamp {
	uint64_t sequence;
	uint16_t slot;
};

// To nobody: the host's stack takes the frame, looks at the address, and lets it fall.
static const uint8_t addresses[12] = {2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2};

static size_t stamp_at(const struct options *options)
{
	return options->gso ? HEADERS : sizeof(struct ethhdr);
}

static size_t body_at(const struct options *options)
{
	return stamp_at(options) + sizeof(struct stamp);
}

void frame_header(const struct options *options, struct virtio_net_hdr *header)
{
	memset(header, 0, sizeof(*header));
	if (!options->gso)
		return;
	header->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
	header->gso_type = VIRTIO_NET_HDR_GSO_TCPV4;
	header->hdr_len = HEADERS;
	header->gso_size = MSS;
	header->csum_start = sizeof(struct ethhdr) + sizeof(struct iphdr);
	header->csum_offset = offsetof(struct tcphdr, check);
}

static uint64_t body_word(uint16_t slot, size_t index)
{
	return (slot + 1u) * GOLDEN + index;
}

void frame_make(const struct options *options, uint8_t *frame, uint16_t slot)
{
	struct ethhdr *ethernet = (void *)frame;
	struct stamp stamp = {0, slot};

	memset(frame, 0, stamp_at(options));
	memcpy(frame, addresses, sizeof(addresses));
	ethernet->h_proto = htons(ETH_P_IP);
	if (options->gso) {
		struct iphdr *ip = (void *)(ethernet + 1);
		struct tcphdr *tcp = (void *)(ip + 1);

		ip->version = 4;
		ip->ihl = sizeof(*ip) / 4;
		ip->tot_len = htons((uint16_t)(options->length - sizeof(*ethernet)));
		ip->ttl = 64;
		ip->protocol = IPPROTO_TCP;
		ip->saddr = htonl(0x0a000002);
		ip->daddr = htonl(0x0a000001);
		tcp->source = htons(1000);
		tcp->dest = htons(2000);
		tcp->doff = sizeof(*tcp) / 4;
		tcp->ack = 1;
	}
	memcpy(frame + stamp_at(options), &stamp, sizeof(stamp));
	for (size_t at = body_at(options), index = 0; at < options->length; at += 8, index++) {
		uint64_t word = body_word(slot, index);

		memcpy(frame + at, &word, options->length - at < 8 ? options->length - at : 8);
	}
}

static uint16_t type_of(const struct options *options, uint64_t sequence)
{
	bool sampled = options->direction == TRANSMIT && sequence % SAMPLE == 0;

	return htons(sampled ? SAMPLED_TYPE : ETH_P_IP);
}

void frame_stamp(const struct options *options, uint8_t *frame, uint64_t sequence)
{
	uint16_t type = type_of(options, sequence);

	memcpy(frame + sizeof(addresses), &type, sizeof(type));
	memcpy(frame + stamp_at(options), &sequence, sizeof(sequence));
}

uint64_t frame_check(const struct options *options, const uint8_t *frame, size_t length, bool whole)
{
	struct stamp stamp;
	uint64_t wrong = 0;
	uint16_t type;

	if (length != options->length)
		fail("a frame of %u bytes came as one of %zu", options->length, length);
	memcpy(&type, frame + sizeof(addresses), sizeof(type));
	memcpy(&stamp, frame + stamp_at(options), sizeof(stamp));
	if (memcmp(frame, addresses, sizeof(addresses)) || type != type_of(options, stamp.sequence))
		fail("frame %lu: its head is wrong", stamp.sequence);
	if (!whole)
		return stamp.sequence;
	for (size_t at = body_at(options), index = 0; at < length; at += 8, index++) {
		uint64_t word = body_word(stamp.slot, index), there = word;

		memcpy(&there, frame + at, length - at < 8 ? length - at : 8);
		wrong |= word ^ there;
	}
	if (wrong)
		fail("frame %lu: its head is right, the rest isn't", stamp.sequence);
	return stamp.sequence;
}
