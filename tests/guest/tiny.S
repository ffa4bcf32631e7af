/*
 * A guest of a few hundred bytes for VMMs that boot ELF kernels by the PVH protocol (Firecracker, Cloud Hypervisor,
 * QEMU), where no kernel can be run. It needs no device but the serial port at 0x3f8, no interrupts, 6 MiB of memory.
 *
 *   gcc -nostdlib -static -no-pie -Wl,-N,-Ttext-segment=0x100000,--build-id=none -o tiny tiny.S
 *
 * It counts. For each number it writes a page of its own, in a ring of 256 pages from 4 MiB on, and a line
 *
 *   NONCE NUMBER        both in eight hexadecimal digits
 *
 * about every 2^24 ticks of the time stamp counter. The nonce is taken once, at boot, and lives only in memory: a
 * guest that was restored tells the old one, a guest that was booted again tells another. Before each line it looks
 * whether the pages of the last number and of the round before are as it left them; else it writes "lost" and stops,
 * so a page that a copy of its memory missed is found within one round.
 */
#define PORT 0x3f8
#define RING 0x400000
#define PAGES 256
#define INTERVAL 0x1000000

    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 8, 18 /* the sizes of name and value, XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .quad _start

    .text
    .code32
    .globl _start
_start:
    movl $stack, %esp
    rdtsc
    movl %eax, nonce
    movl %eax, last
    movl $0, number

step:
    movl number, %ebx
    testl %ebx, %ebx
    jz fresh
    leal -1(%ebx), %ecx /* the page of the last number */
    call page
    cmpl %ecx, (%edi)
    jne lost
    cmpl $PAGES, %ebx
    jb fresh
    leal -PAGES(%ebx), %ecx /* the page of the round before, in the same place */
    call page
    cmpl %ecx, (%edi)
    jne lost
fresh:
    movl %ebx, %ecx
    call page
    movl %ebx, (%edi)

    movl nonce, %eax
    call hexadecimal
    movb $' ', %al
    call character
    movl number, %eax
    call hexadecimal
    movb $'\n', %al
    call character
    incl number

wait: /* a counter that was set back makes the difference large, and the wait short */
    rdtsc
    movl %eax, %ecx
    subl last, %ecx
    cmpl $INTERVAL, %ecx
    jb wait
    movl %eax, last
    jmp step

lost:
    movl $message, %esi
1:  movb (%esi), %al
    testb %al, %al
    jz halt
    call character
    incl %esi
    jmp 1b
halt:
    hlt
    jmp halt

page: /* %edi: the page of the number in %ecx */
    movl %ecx, %edi
    andl $PAGES - 1, %edi
    shll $12, %edi
    addl $RING, %edi
    ret

hexadecimal: /* %eax, in eight digits */
    movl %eax, %ebp
    movl $8, %ecx
1:  roll $4, %ebp
    movl %ebp, %eax
    andl $15, %eax
    movb digits(%eax), %al
    call character
    decl %ecx
    jnz 1b
    ret

character: /* %al, once the port takes one (line status, bit 5) */
    movb %al, %ah
    movw $PORT + 5, %dx
1:  inb %dx, %al
    testb $0x20, %al
    jz 1b
    movb %ah, %al
    movw $PORT, %dx
    outb %al, %dx
    ret

digits:
    .ascii "0123456789abcdef"
message:
    .asciz "lost\n"

    .balign 8
nonce:
    .long 0
number:
    .long 0
last:
    .long 0
    .skip 256
stack:

    .section .note.GNU-stack, "", @progbits
