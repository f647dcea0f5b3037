// 16550A UART (National PC16550D data sheet, 8.0), as fast as the reader: a character written
// to THR is "sent" when it is in the output ring, and the receive FIFO is 1024 deep.
#include "core/uart.h"

#include <errno.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

// While characters keep coming the reader is woken once in this time, with what collected:
// a wake-up for each would cost the guest twice the exit itself.
#define BATCH_NS 1000000L
#define QUIET_NS 10000000L // after this the first one is told at once

enum {
	REG_DATA = 0, // RBR, THR; DLL with DLAB
	REG_IER = 1,  // DLM with DLAB
	REG_IIR = 2,  // FCR on writes
	REG_LCR = 3,
	REG_MCR = 4,
	REG_LSR = 5,
	REG_MSR = 6,
	REG_SCR = 7,
};

enum {
	IER_RX = 1, IER_THR = 2, IER_LINE = 4, IER_MODEM = 8,
	IIR_NONE = 0x01, IIR_MODEM = 0x00, IIR_THR = 0x02, IIR_RX = 0x04, IIR_LINE = 0x06,
	IIR_TIMEOUT = 0x0c, IIR_FIFO = 0xc0,
	FCR_ENABLE = 1, FCR_CLEAR_RX = 2,
	LCR_DLAB = 0x80,
	MCR_DTR = 1, MCR_RTS = 2, MCR_OUT1 = 4, MCR_OUT2 = 8, MCR_LOOP = 0x10, MCR_MASK = 0x1f,
	LSR_DATA = 1, LSR_OVERRUN = 2, LSR_EMPTY = 0x60,
	MSR_TERI = 0x04, MSR_CTS = 0x10, MSR_DSR = 0x20, MSR_RI = 0x40, MSR_DCD = 0x80,
	MSR_CONNECTED = MSR_CTS | MSR_DSR | MSR_DCD,
};

struct sv_uart {
	pthread_mutex_t lock; // everything below
	int vm_fd;
	uint32_t gsi;
	int irq_event_fd;
	int output_fd; // a timer
	int64_t notified_at;
	bool notified; // output_fd is readable, or will be when its time is over
	bool refused;  // put_input had no room: say so when there is
	bool thr_due;  // the "THR empty" interrupt is latched
	uint8_t raised; // interrupt sources (IER bits) after the last change
	uint8_t ier, fcr, lcr, mcr, msr, scr, dll, dlm;
	uint8_t line_errors;
	uint32_t rx_head, rx_count;
	uint32_t tx_head, tx_count;
	uint8_t rx[SV_UART_RX_SIZE];
	uint8_t tx[SV_UART_TX_SIZE];
};

static void set_power_on(struct sv_uart *uart)
{
	uart->ier = uart->fcr = uart->lcr = uart->mcr = uart->scr = 0;
	uart->dll = 12; // 9600 baud; nobody counts
	uart->dlm = 0;
	uart->msr = MSR_CONNECTED;
	uart->line_errors = 0;
	uart->rx_head = uart->rx_count = 0;
	uart->thr_due = false;
	uart->raised = 0;
}

int sv_uart_create(int vm_fd, uint32_t gsi, int irq_event_fd, struct sv_uart **out)
{
	struct sv_uart *uart = calloc(1, sizeof(*uart));

	if (!uart)
		return -ENOMEM;
	uart->output_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	if (uart->output_fd < 0) {
		int ret = -errno;

		free(uart);
		return ret;
	}
	pthread_mutex_init(&uart->lock, NULL);
	uart->vm_fd = vm_fd;
	uart->gsi = gsi;
	uart->irq_event_fd = irq_event_fd;
	set_power_on(uart);
	*out = uart;
	return 0;
}

void sv_uart_destroy(struct sv_uart *uart)
{
	if (!uart)
		return;
	close(uart->output_fd);
	pthread_mutex_destroy(&uart->lock);
	free(uart);
}

int sv_uart_output_fd(struct sv_uart *uart)
{
	return uart->output_fd;
}

static void set_timer(struct sv_uart *uart, long delay)
{
	struct itimerspec when = {.it_value.tv_nsec = delay};

	timerfd_settime(uart->output_fd, 0, &when, NULL); // 0 also forgets that it expired
}

static void notify(struct sv_uart *uart)
{
	struct timespec now;
	int64_t ns;

	if (uart->notified)
		return;
	clock_gettime(CLOCK_MONOTONIC, &now);
	ns = now.tv_sec * 1000000000L + now.tv_nsec;
	set_timer(uart, ns - uart->notified_at > QUIET_NS ? 1 : BATCH_NS);
	uart->notified_at = ns;
	uart->notified = true;
}

static void pulse(struct sv_uart *uart)
{
	struct kvm_irq_level level = {.irq = uart->gsi, .level = 1};

	if (uart->vm_fd < 0) {
		eventfd_write(uart->irq_event_fd, 1);
		return;
	}
	// Not by irqfd: KVM hands the irqfd of an IOAPIC pin to a kernel thread, which costs a
	// wake-up per interrupt; this is done when it returns.
	ioctl(uart->vm_fd, KVM_IRQ_LINE, &level);
	level.level = 0;
	ioctl(uart->vm_fd, KVM_IRQ_LINE, &level);
}

static uint8_t sources(const struct sv_uart *uart)
{
	uint8_t found = 0;

	if (uart->line_errors)
		found |= IER_LINE;
	if (uart->rx_count)
		found |= IER_RX;
	if (uart->thr_due)
		found |= IER_THR;
	if (uart->msr & 0x0f)
		found |= IER_MODEM;
	return found & uart->ier;
}

// The GSI is an edge: pulse it for every source that came up, even while another one is up.
// A driver that leaves its handler with a source pending would else never hear of us again.
static void update_irq(struct sv_uart *uart)
{
	uint8_t now = sources(uart);

	if (now & ~uart->raised)
		pulse(uart);
	uart->raised = now;
}

static bool receive(struct sv_uart *uart, uint8_t value)
{
	if (uart->rx_count == SV_UART_RX_SIZE)
		return false;
	uart->rx[(uart->rx_head + uart->rx_count++) % SV_UART_RX_SIZE] = value;
	return true;
}

static void transmit(struct sv_uart *uart, uint8_t value)
{
	if (uart->mcr & MCR_LOOP) {
		if (!receive(uart, value))
			uart->line_errors |= LSR_OVERRUN;
		uart->thr_due = true;
		return;
	}
	// Full ring: THRE was clear, so a driver that writes all the same loses the character,
	// as it would on hardware.
	if (uart->tx_count < SV_UART_TX_SIZE) {
		uart->tx[(uart->tx_head + uart->tx_count++) % SV_UART_TX_SIZE] = value;
		notify(uart);
		if (uart->tx_count == SV_UART_TX_SIZE / 2)
			set_timer(uart, 1);
	}
	uart->thr_due = uart->tx_count < SV_UART_TX_SIZE;
}

// After a refusal: there is room for a good part, and the receiver is connected.
static void welcome_input(struct sv_uart *uart)
{
	if (!uart->refused || uart->mcr & MCR_LOOP || uart->rx_count > SV_UART_RX_SIZE / 2)
		return;
	uart->refused = false;
	notify(uart);
}

static uint8_t read_data(struct sv_uart *uart)
{
	uint8_t value;

	if (!uart->rx_count)
		return 0;
	value = uart->rx[uart->rx_head];
	uart->rx_head = (uart->rx_head + 1) % SV_UART_RX_SIZE;
	uart->rx_count--;
	welcome_input(uart);
	return value;
}

static uint8_t read_iir(struct sv_uart *uart)
{
	static const uint8_t trigger[4] = {1, 4, 8, 14};
	uint8_t found = sources(uart);
	uint8_t fifo = uart->fcr & FCR_ENABLE ? IIR_FIFO : 0;

	if (found & IER_LINE)
		return fifo | IIR_LINE;
	if (found & IER_RX) {
		// Below the trigger level the character timeout reports; ours is over at once.
		bool timeout = fifo && uart->rx_count < trigger[uart->fcr >> 6];

		return fifo | (timeout ? IIR_TIMEOUT : IIR_RX);
	}
	if (found & IER_THR) {
		uart->thr_due = false;
		return fifo | IIR_THR;
	}
	return fifo | (found & IER_MODEM ? IIR_MODEM : IIR_NONE);
}

static uint8_t read_lsr(struct sv_uart *uart)
{
	uint8_t value = uart->line_errors;

	uart->line_errors = 0;
	if (uart->rx_count)
		value |= LSR_DATA;
	if (uart->tx_count < SV_UART_TX_SIZE || uart->mcr & MCR_LOOP)
		value |= LSR_EMPTY;
	return value;
}

uint8_t sv_uart_read(struct sv_uart *uart, uint32_t offset)
{
	uint8_t value = 0xff;
	bool dlab;

	pthread_mutex_lock(&uart->lock);
	dlab = uart->lcr & LCR_DLAB;
	switch (offset) {
	case REG_DATA: value = dlab ? uart->dll : read_data(uart); break;
	case REG_IER: value = dlab ? uart->dlm : uart->ier; break;
	case REG_IIR: value = read_iir(uart); break;
	case REG_LCR: value = uart->lcr; break;
	case REG_MCR: value = uart->mcr; break;
	case REG_LSR: value = read_lsr(uart); break;
	case REG_MSR:
		value = uart->msr;
		uart->msr &= 0xf0;
		break;
	case REG_SCR: value = uart->scr; break;
	}
	update_irq(uart);
	pthread_mutex_unlock(&uart->lock);
	return value;
}

// Modem lines after MCR changed: wired to MCR in loopback, else connected.
static void update_modem(struct sv_uart *uart)
{
	uint8_t lines = MSR_CONNECTED, changed;

	if (uart->mcr & MCR_LOOP) {
		lines = 0;
		lines |= uart->mcr & MCR_RTS ? MSR_CTS : 0;
		lines |= uart->mcr & MCR_DTR ? MSR_DSR : 0;
		lines |= uart->mcr & MCR_OUT1 ? MSR_RI : 0;
		lines |= uart->mcr & MCR_OUT2 ? MSR_DCD : 0;
	}
	changed = (uart->msr ^ lines) >> 4;
	// Only the trailing edge of RI counts.
	if (lines & MSR_RI)
		changed &= ~MSR_TERI;
	uart->msr = lines | (uart->msr & 0x0f) | changed;
	welcome_input(uart);
}

static void write_fcr(struct sv_uart *uart, uint8_t value)
{
	if ((value ^ uart->fcr) & FCR_ENABLE || value & FCR_CLEAR_RX)
		uart->rx_head = uart->rx_count = 0;
	// The other bits count only together with FCR_ENABLE. What was "sent" stays sent.
	uart->fcr = value & FCR_ENABLE ? value & 0xc9 : 0;
	welcome_input(uart);
}

static void write_ier(struct sv_uart *uart, uint8_t value)
{
	bool enabled = ~uart->ier & value & IER_THR;

	uart->ier = value & 0x0f;
	// Enabling reports an empty THR again; drivers start to send this way.
	if (enabled && (uart->tx_count < SV_UART_TX_SIZE || uart->mcr & MCR_LOOP))
		uart->thr_due = true;
}

void sv_uart_write(struct sv_uart *uart, uint32_t offset, uint8_t value)
{
	bool dlab;

	pthread_mutex_lock(&uart->lock);
	dlab = uart->lcr & LCR_DLAB;
	switch (offset) {
	case REG_DATA:
		if (dlab)
			uart->dll = value;
		else
			transmit(uart, value);
		break;
	case REG_IER:
		if (dlab)
			uart->dlm = value;
		else
			write_ier(uart, value);
		break;
	case REG_IIR: write_fcr(uart, value); break;
	case REG_LCR: uart->lcr = value; break;
	case REG_MCR:
		uart->mcr = value & MCR_MASK;
		update_modem(uart);
		break;
	case REG_SCR: uart->scr = value; break;
	}
	update_irq(uart);
	pthread_mutex_unlock(&uart->lock);
}

int sv_uart_take_output(struct sv_uart *uart, void *buffer, uint32_t limit)
{
	uint32_t length, first;
	bool full;

	pthread_mutex_lock(&uart->lock);
	full = uart->tx_count == SV_UART_TX_SIZE;
	length = limit < uart->tx_count ? limit : uart->tx_count;
	first = SV_UART_TX_SIZE - uart->tx_head;
	first = length < first ? length : first;
	memcpy(buffer, uart->tx + uart->tx_head, first);
	memcpy((uint8_t *)buffer + first, uart->tx, length - first);
	uart->tx_head = (uart->tx_head + length) % SV_UART_TX_SIZE;
	uart->tx_count -= length;
	if (full && length) {
		uart->thr_due = true;
		update_irq(uart);
	}
	if (!uart->tx_count && uart->notified) {
		uart->notified = false;
		set_timer(uart, 0);
	}
	pthread_mutex_unlock(&uart->lock);
	return (int)length;
}

int sv_uart_put_input(struct sv_uart *uart, const void *data, uint32_t length)
{
	uint32_t done = 0;

	pthread_mutex_lock(&uart->lock);
	// In loopback the receiver is cut off from the outside.
	while (!(uart->mcr & MCR_LOOP) && done < length &&
	       receive(uart, ((const uint8_t *)data)[done]))
		done++;
	uart->refused = done < length;
	// Again even if data was pending already: the edge may have met a masked pin.
	if (done)
		uart->raised &= ~IER_RX;
	update_irq(uart);
	pthread_mutex_unlock(&uart->lock);
	return (int)done;
}

void sv_uart_reset(struct sv_uart *uart)
{
	pthread_mutex_lock(&uart->lock);
	set_power_on(uart);
	welcome_input(uart);
	pthread_mutex_unlock(&uart->lock);
}
