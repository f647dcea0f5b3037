// What the driver has set: into the tap, and into memory for a successor.
#include <errno.h>
#include <sys/ioctl.h>

#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>

#include "net/internal.h"

size_t sv_net_state_size(void)
{
	return sizeof(struct sv_net_state);
}

bool sv_net_state_moved(const struct sv_net *net)
{
	return net->state &&
	       __atomic_load_n(&net->state->generation, __ATOMIC_ACQUIRE) != net->generation;
}

bool sv_net_load(struct sv_net *net)
{
	if (!net->state)
		return false;
	net->generation = __atomic_load_n(&net->state->generation, __ATOMIC_ACQUIRE);
	if (!net->generation)
		return false;
	net->settings = net->state->copies[net->generation & 1];
	return net->settings.filter.unicast_count <= SV_NET_MAC_ENTRIES &&
	       net->settings.filter.multicast_count <= SV_NET_MAC_ENTRIES &&
	       net->settings.pairs > 0 && net->settings.pairs <= net->pairs;
}

void sv_net_save(struct sv_net *net)
{
	uint64_t next;

	if (!net->state)
		return;
	next = net->generation + 1;
	next += next == 0;
	net->generation = next;
	net->state->copies[next & 1] = net->settings;
	// After the copy that it makes the current one.
	__atomic_store_n(&net->state->generation, next, __ATOMIC_RELEASE);
}

int sv_net_apply_offloads(struct sv_net *net, uint64_t offloads)
{
	unsigned int flags = 0;

	// The tap refuses segmentation without checksums.
	if (offloads & (1ull << VIRTIO_NET_F_GUEST_CSUM)) {
		flags |= TUN_F_CSUM;
		if (offloads & (1ull << VIRTIO_NET_F_GUEST_TSO4))
			flags |= TUN_F_TSO4;
		if (offloads & (1ull << VIRTIO_NET_F_GUEST_TSO6))
			flags |= TUN_F_TSO6;
		if (flags & (TUN_F_TSO4 | TUN_F_TSO6) && offloads & (1ull << VIRTIO_NET_F_GUEST_ECN))
			flags |= TUN_F_TSO_ECN;
		if (offloads & (1ull << VIRTIO_NET_F_GUEST_UFO))
			flags |= TUN_F_UFO;
	}
	// One descriptor speaks for the whole interface. EBADFD: it is gone, and nothing comes.
	if (net->queues[0].tap >= 0 && ioctl(net->queues[0].tap, TUNSETOFFLOAD, flags) < 0 &&
	    errno != EBADFD)
		return -errno;
	net->settings.offloads = offloads;
	return 0;
}

// -EINVAL says that the queue is in that state already: a predecessor's, or the only one.
static int set_queue(const struct sv_net *net, unsigned int pair, short flag)
{
	struct ifreq request = {.ifr_flags = flag};

	if (net->queues[2 * pair].tap < 0)
		return 0;
	if (ioctl(net->queues[2 * pair].tap, TUNSETQUEUE, &request) < 0 && errno != EINVAL &&
	    errno != EBADFD) // the interface is gone
		return -errno;
	return 0;
}

int sv_net_apply_pairs(struct sv_net *net, unsigned int pairs)
{
	for (unsigned int i = 1; i < net->pairs; i++) {
		int ret = set_queue(net, i, i < pairs ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE);

		if (ret < 0)
			return ret;
	}
	net->settings.pairs = pairs;
	return 0;
}
