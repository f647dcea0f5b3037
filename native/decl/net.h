#define SV_NET_MAX_PAIRS ...
#define SV_NET_HEADER ...

struct sv_net_counters {
	uint64_t packets;
	uint64_t bytes;
	uint64_t dropped;
	uint64_t errors;
	uint64_t wakeups;
	uint64_t calls;
	uint64_t broken;
	uint64_t commands;
	...;
};

struct sv_rate {
	uint64_t packets;
	uint64_t bytes;
	...;
};

struct sv_net;

struct sv_net_state;
size_t sv_net_state_size(void);

struct sv_net *sv_net_create(const int *taps, unsigned int pairs, bool control,
			     unsigned int queue_size, const uint8_t *mac,
			     const struct sv_rate *limits,
			     struct sv_net_counters *counters, struct sv_net_state *state,
			     int *error);

void sv_net_destroy(struct sv_net *net);

int sv_net_add_region(struct sv_net *net, uint64_t guest_addr, uint64_t size, uint64_t offset,
		      int fd);
int sv_net_remove_region(struct sv_net *net, uint64_t guest_addr, uint64_t size);
int sv_net_clear_regions(struct sv_net *net);

int sv_net_set_features(struct sv_net *net, uint64_t features);

int sv_net_reset(struct sv_net *net);

void sv_net_mac(struct sv_net *net, uint8_t *mac);

void sv_net_set_link(struct sv_net *net, bool up);

struct sv_net_ring {
	unsigned int size;
	uint64_t desc, avail, used;
	uint16_t base;
	int kick_fd;
	int call_fd, err_fd;
	...;
};

int sv_net_start(struct sv_net *net, unsigned int index, const struct sv_net_ring *ring);

int sv_net_stop(struct sv_net *net, unsigned int index);

int sv_net_set_call(struct sv_net *net, unsigned int index, int fd);

const char *sv_net_broken(struct sv_net *net, unsigned int index);
