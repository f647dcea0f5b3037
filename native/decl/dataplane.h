#define SV_MEMORY_MAX_REGIONS ...
#define SV_VIRTQ_MAX_SIZE ...
#define SV_BLK_MAX_SECTORS ...
#define SV_BLK_MAX_SEGMENTS ...
#define SV_BLK_MAX_DATA_SEGMENTS ...
#define SV_BLK_ID_BYTES ...
#define SV_BLK_BUCKETS ...

enum { SV_BLK_READ, SV_BLK_WRITE, SV_BLK_FLUSH, SV_BLK_DISCARD, SV_BLK_ZERO, SV_BLK_OTHER };

enum sv_engine_kind { SV_ENGINE_THREADS, SV_ENGINE_URING, SV_ENGINE_URING_FREE, ... };

struct sv_disk {
	int fd;
	bool readonly;
	bool direct;
	bool block_device;
	bool unmap;
	bool detect_zeroes;
	bool detect_unmap;
	bool writeback;
	bool no_zero_range;
	uint64_t size;
	uint64_t capacity;
	uint32_t align;
	uint32_t memory_align;
	uint8_t id[20];
	...;
};

struct sv_blk_counters {
	uint64_t reads, writes, flushes, discards, write_zeroes, others;
	uint64_t read_bytes, written_bytes, unmapped_bytes;
	uint64_t errors;
	uint64_t inline_ops;
	uint64_t bounced;
	uint64_t wakeups;
	uint64_t calls;
	uint64_t broken;
	uint64_t throttled;
	uint64_t failed[4];
	uint64_t invalid[4];
	uint64_t total_ns[4];
	uint64_t latency[4][28];
	...;
};

enum sv_limit {
	SV_LIMIT_OPS,
	SV_LIMIT_READ_OPS,
	SV_LIMIT_WRITE_OPS,
	SV_LIMIT_BYTES,
	SV_LIMIT_READ_BYTES,
	SV_LIMIT_WRITE_BYTES,
	...
};

struct sv_limits {
	uint64_t rate[6];
	uint64_t burst[6];
};

struct sv_plane;

struct sv_ring_setup {
	unsigned int size;
	uint64_t desc, avail, used;
	uint64_t features;
	uint16_t base;
	int kick_fd;
	int call_fd, err_fd;
	...;
};

struct sv_plane *sv_plane_create(const struct sv_disk *disk, unsigned int queues,
				 unsigned int queue_size, enum sv_engine_kind engine,
				 struct sv_blk_counters *counters, int *error);
void sv_plane_destroy(struct sv_plane *plane);
int sv_uring_probe(bool restricted);
int sv_plane_add_region(struct sv_plane *plane, uint64_t guest_addr, uint64_t size,
			uint64_t offset, int fd);
int sv_plane_remove_region(struct sv_plane *plane, uint64_t guest_addr, uint64_t size);
int sv_plane_clear_regions(struct sv_plane *plane);
int sv_plane_set_writeback(struct sv_plane *plane, bool writeback);
int sv_plane_sync(struct sv_plane *plane);
int sv_plane_set_inflight(struct sv_plane *plane, int fd, uint64_t offset, uint64_t size,
			  unsigned int queues, unsigned int queue_size);
int sv_queue_start(struct sv_plane *plane, unsigned int index, const struct sv_ring_setup *setup);
int sv_queue_stop(struct sv_plane *plane, unsigned int index);
int sv_queue_set_call(struct sv_plane *plane, unsigned int index, int fd);
const char *sv_queue_broken(struct sv_plane *plane, unsigned int index);
int sv_plane_resize(struct sv_plane *plane, uint64_t size);
uint64_t sv_plane_failures(const struct sv_plane *plane, unsigned int type, int *error);
int sv_plane_watch_failures(struct sv_plane *plane, int event_fd);
int sv_plane_set_limits(struct sv_plane *plane, const struct sv_limits *limits);
void sv_plane_set_poll(struct sv_plane *plane, uint64_t limit_ns);
size_t sv_inflight_size(unsigned int size);
