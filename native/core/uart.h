// 16550A UART: registers on the vCPU's thread, characters from and to the main thread.
#pragma once

#include <stdint.h>

#define SV_UART_RX_SIZE 1024
#define SV_UART_TX_SIZE 65536
#define SV_UART_PORTS 8

struct sv_uart;

// Raises `gsi` of the VM by KVM_IRQ_LINE pulses; with vm_fd -1 writes `irq_event_fd` instead.
int sv_uart_create(int vm_fd, uint32_t gsi, int irq_event_fd, struct sv_uart **uart);
void sv_uart_destroy(struct sv_uart *uart);
// Readable, at the latest a millisecond later, while there is output to take, or room for input
// after a refusal; taking everything clears it.
int sv_uart_output_fd(struct sv_uart *uart);
int sv_uart_take_output(struct sv_uart *uart, void *buffer, uint32_t limit);
int sv_uart_put_input(struct sv_uart *uart, const void *data, uint32_t length);
void sv_uart_reset(struct sv_uart *uart);
uint8_t sv_uart_read(struct sv_uart *uart, uint32_t offset);
void sv_uart_write(struct sv_uart *uart, uint32_t offset, uint8_t value);
