#define SV_RING_MAX_QUEUES ...

struct sv_ring_device;

struct sv_ring_counters {
	uint64_t chains;
	uint64_t calls;
	uint64_t kicks;
	uint64_t broken;
	...;
};

struct sv_ring_place {
	unsigned int size;
	uint64_t desc, avail, used;
	uint16_t base;
	int kick_fd;
	int call_fd, err_fd;
	...;
};

void sv_ring_destroy(struct sv_ring_device *device);
int sv_ring_add_region(struct sv_ring_device *device, uint64_t guest_addr, uint64_t size,
		       uint64_t offset, int fd);
int sv_ring_remove_region(struct sv_ring_device *device, uint64_t guest_addr, uint64_t size);
int sv_ring_clear_regions(struct sv_ring_device *device);
int sv_ring_set_features(struct sv_ring_device *device, uint64_t features);
int sv_ring_reset(struct sv_ring_device *device);
int sv_ring_start(struct sv_ring_device *device, unsigned int index,
		  const struct sv_ring_place *place);
int sv_ring_stop(struct sv_ring_device *device, unsigned int index);
int sv_ring_set_call(struct sv_ring_device *device, unsigned int index, int fd);
const char *sv_ring_broken(struct sv_ring_device *device, unsigned int index);
int sv_ring_notify_fd(const struct sv_ring_device *device);

// ---- rng --------------------------------------------------------------------------------------

#define SV_RNG_MAX_BYTES ...

struct sv_rng_counters {
	struct sv_ring_counters ring;
	uint64_t bytes;
	uint64_t throttled;
	uint64_t starved;
	uint64_t errors;
	...;
};

struct sv_ring_device *sv_rng_create(int source, uint64_t max_bytes, unsigned int period_ms,
				     unsigned int queue_size, struct sv_rng_counters *counters,
				     int *error);

// ---- console ----------------------------------------------------------------------------------

#define SV_CONSOLE_MAX_PORTS ...
#define SV_CONSOLE_NAME_BYTES ...

struct sv_console_counters {
	struct sv_ring_counters ring;
	uint64_t bytes;
	uint64_t unheard;
	uint64_t waits;
	uint64_t errors;
	...;
};

struct sv_console_port {
	int fd;
	bool console;
	bool open;
	uint16_t cols, rows;
	char name[...];
	...;
};

struct sv_console_state;
size_t sv_console_state_size(void);

struct sv_ring_device *sv_console_create(const struct sv_console_port *ports,
					 unsigned int max_ports, unsigned int queue_size,
					 struct sv_console_counters *counters,
					 struct sv_console_state *state, int *error);
int sv_console_set_open(struct sv_ring_device *device, unsigned int nr, bool open);
int sv_console_set_size(struct sv_ring_device *device, unsigned int nr, uint16_t cols,
			uint16_t rows);

// ---- balloon ----------------------------------------------------------------------------------

#define SV_BALLOON_QUEUES ...
#define SV_BALLOON_MAX_PFNS ...
#define SV_BALLOON_MAX_ENTRIES ...
#define SV_BALLOON_TAGS ...

struct sv_balloon_counters {
	struct sv_ring_counters ring;
	uint64_t inflated_pages;
	uint64_t deflated_pages;
	uint64_t reported_pages;
	uint64_t removed_bytes;
	uint64_t removals;
	uint64_t failed_bytes;
	uint64_t refused_pages;
	uint64_t reports;
	...;
};

struct sv_balloon_news {
	bool told;
	uint32_t present;
	uint64_t values[...];
	int error;
	...;
};

struct sv_ring_device *sv_balloon_create(bool keep, unsigned int queue_size,
					 struct sv_balloon_counters *counters, int *error);
int sv_balloon_ask(struct sv_ring_device *device);
void sv_balloon_take(struct sv_ring_device *device, struct sv_balloon_news *news);
