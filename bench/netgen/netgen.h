// Loads a net back end through its rings and a tap, verifies what comes out and counts what it costs;
// or does the same with bare system calls on the tap.
//
// It runs in the network namespace of the tap, and is host and guest at once.
#pragma once

#include "frontend/frontend.h"

#define HEADER 12u           // struct virtio_net_hdr_v1, in rings and on the tap
#define SAMPLE 251u          // of so many frames one is verified to the last byte
#define SAMPLED_TYPE 0x88b5u // its Ethernet type (IEEE: for experiments)
#define SEGMENT 4096u        // bytes of a descriptor of what is longer
#define MSS 1448u

// ---- options (main.c) -----------------------------------------------------------------------------
enum direction { TRANSMIT, RECEIVE };

struct options {
	const char *socket;    // of the back end; NULL: bare system calls on `tap`
	int tap;
	const char *interface;
	pid_t pid;             // the back end whose CPU time counts
	enum direction direction;
	uint32_t length;       // bytes of a frame
	bool gso;              // a TCP segment to be cut to MSS
	unsigned int queue_size;
	unsigned int window;   // frames on the way at once
	bool burst;            // receiving: a window of frames is in the tap before buffers are
	uint32_t buffer;       // bytes of a receive buffer
	double seconds;
	bool event_index, indirect, mergeable;
	int pin, floor_pin;    // CPUs of the generator and of the bare loop; -1: any
};

struct result {
	uint64_t frames, elapsed_ns, cpu_ns; // of the measured time
	uint64_t verified, lost;             // of the whole run
	uint64_t kicks, calls;
};

// Whose CPU time counts: processes, or a loop that adds up its own.
struct meter {
	struct cost cost;
	const uint64_t *spent; // atomic; NULL: `cost`
};

// From the end of the warm-up to the end: `frames` and the CPU time are taken at both instants.
struct span {
	uint64_t warm, end, limit, began, frames, cpu;
	bool measuring;
};

void span_begin(struct span *span, double seconds);
// True: the time is over, and `result` is filled in.
bool span_over(struct span *span, uint64_t frames, const struct meter *meter,
	       struct result *result);

// ---- what frames hold (frame.c) -------------------------------------------------------------------
// Each carries its number, the slot that it was made in and a body that follows from the slot.
struct virtio_net_hdr;
// The header of an offload, for rings, taps and packet sockets.
void frame_header(const struct options *options, struct virtio_net_hdr *header);
void frame_make(const struct options *options, uint8_t *frame, uint16_t slot);
void frame_stamp(const struct options *options, uint8_t *frame, uint64_t sequence);
// The frame's number; fails the run if its head (`whole`: any byte of it) is wrong.
uint64_t frame_check(const struct options *options, const uint8_t *frame, size_t length, bool whole);

// ---- the host's side of the tap (host.c) ----------------------------------------------------------
// Sends frames into the interface, numbered from 0.
struct sender;
struct sender *sender_open(const struct options *options);
// Send at most `count` frames at once; how many were sent.
unsigned int sender_send(struct sender *sender, unsigned int count);
uint64_t sender_sent(const struct sender *sender);

// Takes the sampled frames out of the interface and verifies them, on a thread.
struct checker;
struct checker *checker_start(const struct options *options);
// Wait until the interface has taken `expected` frames, or nothing comes any more; how many were
// verified, and how many are missing.
void checker_finish(struct checker *checker, uint64_t expected, struct result *result);

// ---- the guest (guest.c) --------------------------------------------------------------------------
// A queue pair, one ring of which has buffers: `slots` chains of `room` bytes each.
struct guest {
	struct guest_memory memory;
	struct vhost vhost;
	struct ring rings[2];  // receive, transmit
	struct ring *ring;     // that has buffers
	unsigned int slots;
	uint32_t room;
	uint64_t tables, buffers; // guest addresses
};

// Connected, with all slots in the ring; then the back end may begin.
void guest_open(struct guest *guest, const struct options *options);
void guest_start(struct guest *guest);
void guest_stop(struct guest *guest);
// The buffers of a slot.
uint8_t *guest_slot(const struct guest *guest, unsigned int slot);

// ---- runs (transmit.c, receive.c, floor.c) --------------------------------------------------------
void transmit_run(const struct options *options, struct result *result);
void receive_run(const struct options *options, struct result *result);
void floor_transmit(const struct options *options, struct result *result);
void floor_receive(const struct options *options, struct result *result);
